"""内嵌 PostgreSQL 的角色：应用用一个普通的，超级用户登录不了，只在服务器没有运行时（单用户模式）用一下。

超级用户能以 COPY … TO PROGRAM 运行程序、读写文件：谁拿到应用的口令，也就拿到了运行 PostgreSQL 的那个账户。
initdb 建的第一个角色去不掉超级用户的属性，所以改它的名字，把原来的名字与口令给一个新的普通角色：地址不变。
"""

from __future__ import annotations

ROLE = "etl"
DATABASE = "etl"

# 会话自己的角色不能改名，所以借一个临时的
MAKE_ORDINARY = """
DO $$ BEGIN
    IF EXISTS (SELECT FROM pg_authid WHERE oid = 10 AND rolname = 'etl') THEN
        CREATE ROLE dayline_renaming SUPERUSER;
        SET SESSION AUTHORIZATION dayline_renaming;
        ALTER ROLE etl RENAME TO dayline_superuser;
        SET SESSION AUTHORIZATION dayline_superuser;
        DROP ROLE dayline_renaming;
        CREATE ROLE etl LOGIN CREATEDB CREATEROLE;
        GRANT pg_monitor, pg_checkpoint TO etl;
        EXECUTE format('ALTER ROLE etl PASSWORD %L', (SELECT rolpassword FROM pg_authid WHERE oid = 10));
        ALTER ROLE dayline_superuser NOLOGIN PASSWORD NULL;
    END IF;
END $$
"""

CREATE_DATABASE = "CREATE DATABASE etl OWNER etl"

# 单用户模式在自己的提示符后面印出结果，所以每一行带着记号
DATABASE_MARK = "database: "
LIST_DATABASES = """
COPY (SELECT 'database: ' || to_json(datname)::text FROM pg_database WHERE datallowconn AND NOT datistemplate)
TO STDOUT
"""

# 一个数据库里超级用户名下的都交给应用的角色：REASSIGN OWNED 不动第一个角色的东西。
# 扩展的不动；随表走的序列、随别的东西走的类型不能单独换主人
GIVE_OBJECTS = """
DO $$ DECLARE command text; BEGIN
    FOR command IN
        WITH kept AS (
            SELECT classid, objid FROM pg_depend
            WHERE deptype = 'e'
            OR deptype IN ('a', 'i') AND classid = 'pg_type'::regclass
            OR deptype IN ('a', 'i') AND objid IN (SELECT oid FROM pg_class WHERE relkind = 'S')
        )
        SELECT format('ALTER DATABASE %I OWNER TO etl', datname)
        FROM pg_database WHERE datdba = 10 AND datname = current_database()
        UNION ALL
        SELECT format('ALTER SCHEMA %I OWNER TO etl', nspname)
        FROM pg_namespace WHERE nspowner = 10 AND oid >= 16384 AND ('pg_namespace'::regclass, oid) NOT IN (TABLE kept)
        UNION ALL
        SELECT format('ALTER TABLE %s OWNER TO etl', oid::regclass)
        FROM pg_class WHERE relowner = 10 AND oid >= 16384 AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
        AND ('pg_class'::regclass, oid) NOT IN (TABLE kept)
        UNION ALL
        SELECT format('ALTER ROUTINE %s OWNER TO etl', oid::regprocedure)
        FROM pg_proc WHERE proowner = 10 AND oid >= 16384 AND ('pg_proc'::regclass, oid) NOT IN (TABLE kept)
        UNION ALL
        SELECT format('ALTER TYPE %s OWNER TO etl', oid::regtype)
        FROM pg_type WHERE typowner = 10 AND oid >= 16384 AND ('pg_type'::regclass, oid) NOT IN (TABLE kept)
    LOOP
        EXECUTE command;
    END LOOP;
END $$
"""
