"""内嵌 PostgreSQL 的角色：应用用一个普通的，超级用户登录不了，只在服务器没有运行时（单用户模式）用一下。

超级用户能以 COPY … TO PROGRAM 运行程序、读写文件：谁拿到应用的口令，也就拿到了运行 PostgreSQL 的那个账户。
initdb 建的第一个角色去不掉超级用户的属性，所以改它的名字，把原来的名字与口令给一个新的普通角色：地址不变。
"""

from __future__ import annotations

ROLE = "etl"
SERVICE = "dayline_service"
"""栈的各个进程登录用的：不是表的主人，有的只是 dayline_etl 的权限。"""
DATABASE = "etl"

# 先有它，接过各个数据库里的东西，最后才换名字：半路上失败了，旧的版本照样能用
CREATE_SUCCESSOR = """
DO $$ BEGIN
    IF EXISTS (SELECT FROM pg_authid WHERE oid = 10 AND rolname = 'etl')
    AND NOT EXISTS (SELECT FROM pg_authid WHERE rolname = 'dayline_application') THEN
        CREATE ROLE dayline_application LOGIN CREATEDB CREATEROLE;
        GRANT pg_monitor, pg_checkpoint TO dayline_application;
    END IF;
END $$
"""

# 会话自己的角色不能改名，所以借一个临时的
SWAP_ROLES = """
DO $$ BEGIN
    IF EXISTS (SELECT FROM pg_authid WHERE oid = 10 AND rolname = 'etl') THEN
        CREATE ROLE dayline_renaming SUPERUSER;
        SET SESSION AUTHORIZATION dayline_renaming;
        ALTER ROLE etl RENAME TO dayline_superuser;
        SET SESSION AUTHORIZATION dayline_superuser;
        DROP ROLE dayline_renaming;
        ALTER ROLE dayline_application RENAME TO etl;
        EXECUTE format('ALTER ROLE etl PASSWORD %L', (SELECT rolpassword FROM pg_authid WHERE oid = 10));
        ALTER ROLE dayline_superuser NOLOGIN PASSWORD NULL;
    END IF;
END $$
"""

CREATE_DATABASE = "CREATE DATABASE etl OWNER etl"

# 别人的会话占着锁多久了，要 pg_monitor 才看得到；只有超级用户能让 etl 把它给出去
LET_GRANT_MONITOR = "GRANT pg_monitor TO etl WITH ADMIN OPTION"

# 单用户模式在自己的提示符后面印出结果，所以每一行带着记号
DATABASE_MARK = "database: "
LIST_DATABASES = """
COPY (SELECT 'database: ' || to_json(datname)::text FROM pg_database WHERE datallowconn AND NOT datistemplate)
TO STDOUT
"""

# 一个数据库里超级用户名下的都交给应用的角色：REASSIGN OWNED 不动第一个角色的东西。
# 扩展的不动；随表走的序列、随别的东西走的类型不能单独换主人；死了的会话留下的临时的东西谁也动不了，服务器起来自己会收拾
GIVE_OBJECTS = """
DO $$ DECLARE command text; successor text; BEGIN
    SELECT rolname INTO STRICT successor FROM pg_roles WHERE rolname IN ('etl', 'dayline_application') AND oid <> 10;
    FOR command IN
        WITH kept AS (
            SELECT classid, objid FROM pg_depend
            WHERE deptype = 'e'
            OR deptype IN ('a', 'i') AND classid = 'pg_type'::regclass
            OR deptype IN ('a', 'i') AND objid IN (SELECT oid FROM pg_class WHERE relkind = 'S')
        ), passing AS (
            SELECT oid FROM pg_namespace WHERE nspname ~ '^pg_'
        )
        SELECT format('ALTER DATABASE %I OWNER TO %I', datname, successor)
        FROM pg_database WHERE datdba = 10 AND datname = current_database()
        UNION ALL
        SELECT format('ALTER SCHEMA %I OWNER TO %I', nspname, successor)
        FROM pg_namespace WHERE nspowner = 10 AND oid >= 16384
        AND oid NOT IN (TABLE passing) AND ('pg_namespace'::regclass, oid) NOT IN (TABLE kept)
        UNION ALL
        SELECT format('ALTER TABLE %s OWNER TO %I', oid::regclass, successor)
        FROM pg_class WHERE relowner = 10 AND oid >= 16384 AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
        AND relnamespace NOT IN (TABLE passing) AND ('pg_class'::regclass, oid) NOT IN (TABLE kept)
        UNION ALL
        SELECT format('ALTER ROUTINE %s OWNER TO %I', oid::regprocedure, successor)
        FROM pg_proc WHERE proowner = 10 AND oid >= 16384
        AND pronamespace NOT IN (TABLE passing) AND ('pg_proc'::regclass, oid) NOT IN (TABLE kept)
        UNION ALL
        SELECT format('ALTER TYPE %s OWNER TO %I', oid::regtype, successor)
        FROM pg_type WHERE typowner = 10 AND oid >= 16384
        AND typnamespace NOT IN (TABLE passing) AND ('pg_type'::regclass, oid) NOT IN (TABLE kept)
    LOOP
        EXECUTE command;
    END LOOP;
END $$
"""
