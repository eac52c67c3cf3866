-- 每次导入的账，每个目标 schema 一份：
--   SELECT * FROM etl.accounting WHERE target = 'public' ORDER BY completed_at DESC;
-- 函数里是动态 SQL：目标 schema 是参数，而且视图不牵住应用的表，应用照样能改自己的列。

CREATE FUNCTION etl.account_imports(target text)
RETURNS TABLE (
    import_id uuid, source_name text, status text, completed_at timestamptz,
    raw bigint, loaded bigint, superseded bigint, rejected bigint, waiting bigint
)
LANGUAGE plpgsql STABLE AS $function$
BEGIN
    RETURN QUERY EXECUTE format($query$
        WITH outcome AS (
            SELECT r.import_id,
                   x.raw_id IS NOT NULL AS is_rejected,
                   x.raw_id IS NULL AND o.raw_id = r.raw_id AS is_loaded,
                   x.raw_id IS NULL AND o.raw_id <> r.raw_id AS is_superseded
            FROM public.raw_orders r
            LEFT JOIN public.shop_configs s ON s.shop_name = btrim(r.shop, $1)
            LEFT JOIN %I.orders o ON o.shop_id = s.shop_id AND o.order_id = btrim(r.order_id, $1)
            LEFT JOIN etl.rejected_rows x ON x.target = $2 AND x.raw_id = r.raw_id
        ), counted AS (
            SELECT t.import_id, t.source_name, t.status, t.completed_at,
                   count(c.import_id) AS raw,
                   count(*) FILTER (WHERE t.status = 'completed' AND c.is_loaded) AS loaded,
                   count(*) FILTER (WHERE t.status = 'completed' AND c.is_superseded) AS superseded,
                   count(*) FILTER (WHERE t.status = 'completed' AND c.is_rejected) AS rejected
            FROM public.import_tasks t LEFT JOIN outcome c ON c.import_id = t.import_id
            GROUP BY t.import_id, t.source_name, t.status, t.completed_at
        )
        SELECT *, CASE WHEN status = 'completed' THEN raw - loaded - superseded - rejected ELSE 0 END FROM counted
    $query$, target)
    USING E'\u0009\u000A\u000B\u000C\u000D\u0020\u0085\u00A0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200A\u2028\u2029\u202F\u205F\u3000', target;
END
$function$;

COMMENT ON FUNCTION etl.account_imports IS 'per import: raw = loaded + superseded + rejected + waiting, in the result of one target schema';

CREATE VIEW etl.accounting AS
SELECT targets.target, imports.*
FROM (SELECT 'public' AS target UNION SELECT target FROM etl.ledger) AS targets
CROSS JOIN LATERAL etl.account_imports(targets.target) AS imports
WHERE to_regclass(format('%I.orders', targets.target)) IS NOT NULL;

COMMENT ON VIEW etl.accounting IS 'per target schema and import: raw = loaded + superseded + rejected + waiting';
