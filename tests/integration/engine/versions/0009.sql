


SET statement_timeout = 0;
SET lock_timeout = 0;
SET idle_in_transaction_session_timeout = 0;
SET client_encoding = 'UTF8';
SET standard_conforming_strings = on;
SELECT pg_catalog.set_config('search_path', '', false);
SET check_function_bodies = false;
SET xmloption = content;
SET client_min_messages = warning;
SET row_security = off;


CREATE SCHEMA etl;



CREATE FUNCTION etl.account_imports(target text) RETURNS TABLE(import_id uuid, source_name text, status text, completed_at timestamp with time zone, raw bigint, loaded bigint, superseded bigint, rejected bigint, waiting bigint)
    LANGUAGE plpgsql STABLE
    AS $_$
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
$_$;



COMMENT ON FUNCTION etl.account_imports(target text) IS 'per import: raw = loaded + superseded + rejected + waiting, in the result of one target schema';


SET default_tablespace = '';

SET default_table_access_method = heap;


CREATE TABLE etl.ledger (
    target text NOT NULL,
    asset text NOT NULL,
    day date NOT NULL,
    requested bigint DEFAULT 0 NOT NULL,
    materialized bigint DEFAULT 0 NOT NULL,
    requested_at timestamp with time zone,
    materialized_at timestamp with time zone,
    run_id text,
    allow_deletes boolean DEFAULT false NOT NULL,
    failures integer DEFAULT 0 NOT NULL,
    retry_at timestamp with time zone,
    held_reason text,
    failed_run_id text,
    changed_since bigint DEFAULT 0 NOT NULL,
    changed_until bigint DEFAULT 0 NOT NULL,
    fingerprint text,
    scope text
);



COMMENT ON TABLE etl.ledger IS 'per asset and day: due while requested > materialized';



CREATE VIEW etl.accounting AS
 SELECT targets.target,
    imports.import_id,
    imports.source_name,
    imports.status,
    imports.completed_at,
    imports.raw,
    imports.loaded,
    imports.superseded,
    imports.rejected,
    imports.waiting
   FROM (( SELECT 'public'::text AS target
        UNION
         SELECT ledger.target
           FROM etl.ledger) targets
     CROSS JOIN LATERAL etl.account_imports(targets.target) imports(import_id, source_name, status, completed_at, raw, loaded, superseded, rejected, waiting))
  WHERE (to_regclass(format('%I.orders'::text, targets.target)) IS NOT NULL);



COMMENT ON VIEW etl.accounting IS 'per target schema and import: raw = loaded + superseded + rejected + waiting';



CREATE TABLE etl.cold_sweeps (
    target text NOT NULL,
    last_warm_day date,
    rollout text NOT NULL
);



COMMENT ON TABLE etl.cold_sweeps IS 'leads without closed_at, of the customers in this share, are COLD if their last order is before last_warm_day, else OPEN';



CREATE TABLE etl.counted_imports (
    target text NOT NULL,
    day date NOT NULL,
    import_id uuid NOT NULL,
    rows integer NOT NULL
);



CREATE TABLE etl.day_accounts (
    target text NOT NULL,
    day date NOT NULL,
    account jsonb NOT NULL
);



CREATE TABLE etl.import_events (
    target text NOT NULL,
    import_id uuid NOT NULL,
    event_id uuid NOT NULL,
    handled_at timestamp with time zone DEFAULT now() NOT NULL,
    stream_sequence bigint
);



COMMENT ON TABLE etl.import_events IS 'the newest handled event of each import';



CREATE TABLE etl.import_requests (
    target text NOT NULL,
    import_id uuid NOT NULL,
    day date NOT NULL,
    revision bigint NOT NULL
);



COMMENT ON TABLE etl.import_requests IS 'the ledger revision of orders at which an import asked for a day';



CREATE TABLE etl.import_watches (
    target text NOT NULL,
    watched_from timestamp with time zone NOT NULL,
    watched_until timestamp with time zone NOT NULL
);



COMMENT ON TABLE etl.import_watches IS 'imports completed between these moments were announced, or taken in without an event';



CREATE TABLE etl.installation (
    installation_id uuid DEFAULT gen_random_uuid() NOT NULL
);



COMMENT ON TABLE etl.installation IS 'one row: tells this installation''s own completion events from those of another ETL';



CREATE TABLE etl.leases (
    run_id text NOT NULL,
    token uuid NOT NULL,
    owner text NOT NULL,
    target text NOT NULL,
    first_day date,
    last_day date,
    acquired_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    expires_at timestamp with time zone NOT NULL,
    cancel_requested_at timestamp with time zone
);



COMMENT ON TABLE etl.leases IS 'one row per running run, by the database''s clock; checked in the data transaction';



CREATE TABLE etl.locks (
    target text NOT NULL,
    kind text NOT NULL,
    key integer NOT NULL
);



COMMENT ON TABLE etl.locks IS 'rows that stand for days, customers (striped), imports (striped) and the claim; locked in sorted order';



CREATE TABLE etl.order_index (
    target text NOT NULL,
    shop_id uuid NOT NULL,
    order_id text NOT NULL,
    customer_nickname text,
    customer_key text NOT NULL,
    order_date date
);



COMMENT ON TABLE etl.order_index IS 'order -> customer, written with the order: finding a customer''s orders needs no scan';



CREATE TABLE etl.outbox (
    outbox_id bigint NOT NULL,
    event_id uuid NOT NULL,
    asset text NOT NULL,
    payload jsonb NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    problem text,
    retry_at timestamp with time zone
);



COMMENT ON TABLE etl.outbox IS 'completion events written in the data transaction; deleted once NATS has stored them';



ALTER TABLE etl.outbox ALTER COLUMN outbox_id ADD GENERATED BY DEFAULT AS IDENTITY (
    SEQUENCE NAME etl.outbox_outbox_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);



CREATE TABLE etl.rejected_rows (
    target text NOT NULL,
    raw_id bigint NOT NULL,
    import_id uuid NOT NULL,
    day date,
    rule text NOT NULL
);



COMMENT ON TABLE etl.rejected_rows IS 'one row per rejected raw row; day is NULL when the row has no business day';



CREATE TABLE etl.schema_version (
    version_num character varying(32) NOT NULL
);



CREATE TABLE etl.stale_customers (
    mark_id bigint NOT NULL,
    target text NOT NULL,
    asset text NOT NULL,
    customer_key text NOT NULL,
    day date
);



COMMENT ON TABLE etl.stale_customers IS 'customers that an order left; each mark is its own version and is deleted by the run that repaired it';



ALTER TABLE etl.stale_customers ALTER COLUMN mark_id ADD GENERATED BY DEFAULT AS IDENTITY (
    SEQUENCE NAME etl.stale_customers_mark_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);



CREATE TABLE etl.troubles (
    process text NOT NULL,
    task text NOT NULL,
    message text NOT NULL,
    times integer DEFAULT 1 NOT NULL,
    first_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    last_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL
);



COMMENT ON TABLE etl.troubles IS 'what went wrong beside the work of a process; shown by status and doctor';



CREATE TABLE etl.waiting_events (
    target text NOT NULL,
    import_id uuid NOT NULL,
    event_id uuid NOT NULL,
    allow_deletes boolean DEFAULT false NOT NULL,
    stream_sequence bigint NOT NULL,
    stored_at timestamp with time zone NOT NULL,
    looks integer DEFAULT 0 NOT NULL,
    look_at timestamp with time zone DEFAULT now() NOT NULL
);



COMMENT ON TABLE etl.waiting_events IS 'events whose import is not completed yet: taken in with it, or dead-lettered';



CREATE TABLE public.business_leads (
    lead_id uuid NOT NULL,
    customer_global_id uuid,
    lead_no integer,
    current_stage text,
    opened_at timestamp with time zone,
    last_order_at timestamp with time zone,
    closed_at timestamp with time zone,
    closed_by text,
    sample_count integer,
    proof_count integer,
    bulk_count integer,
    sample_amount numeric(20,2),
    proof_amount numeric(20,2),
    bulk_amount numeric(20,2),
    owner text,
    notes text,
    created_at timestamp with time zone DEFAULT now(),
    updated_at timestamp with time zone DEFAULT now()
);



CREATE TABLE public.customers (
    customer_global_id uuid NOT NULL,
    customer_key text,
    shop_id uuid,
    customer_nickname text,
    first_order_at timestamp with time zone,
    last_order_at timestamp with time zone,
    order_count integer,
    total_amount numeric(20,2),
    sample_count integer,
    proof_count integer,
    bulk_count integer,
    sample_amount numeric(20,2),
    proof_amount numeric(20,2),
    bulk_amount numeric(20,2),
    created_at timestamp with time zone DEFAULT now(),
    updated_at timestamp with time zone DEFAULT now()
);



CREATE TABLE public.import_tasks (
    import_id uuid NOT NULL,
    source_name text,
    status text,
    row_count integer,
    created_at timestamp with time zone DEFAULT now(),
    completed_at timestamp with time zone
);



CREATE TABLE public.order_type_mappings (
    raw_order_type text NOT NULL,
    system_order_type text
);



CREATE TABLE public.orders (
    shop_id uuid NOT NULL,
    order_id text NOT NULL,
    customer_nickname text,
    latest_status text,
    raw_order_type text,
    system_order_type text,
    amount numeric(14,2),
    quantity integer,
    ordered_at timestamp with time zone,
    order_date date,
    import_id uuid,
    raw_id bigint,
    created_at timestamp with time zone DEFAULT now(),
    updated_at timestamp with time zone DEFAULT now()
);



CREATE TABLE public.raw_orders (
    raw_id bigint NOT NULL,
    import_id uuid,
    order_id text,
    shop text,
    customer_name text,
    order_type text,
    order_status text,
    amount numeric(14,2),
    quantity integer,
    ordered_at timestamp with time zone,
    extra jsonb
);



ALTER TABLE public.raw_orders ALTER COLUMN raw_id ADD GENERATED BY DEFAULT AS IDENTITY (
    SEQUENCE NAME public.raw_orders_raw_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);



CREATE TABLE public.shop_configs (
    shop_id uuid NOT NULL,
    shop_name text,
    platform text
);



INSERT INTO etl.cold_sweeps VALUES ('public', '2025-10-08', '100');



INSERT INTO etl.counted_imports VALUES ('public', '2026-01-05', '00000000-0000-0000-0000-000000000001', 1);
INSERT INTO etl.counted_imports VALUES ('public', '2026-01-06', '00000000-0000-0000-0000-000000000001', 1);
INSERT INTO etl.counted_imports VALUES ('public', '2026-01-06', '00000000-0000-0000-0000-000000000002', 1);



INSERT INTO etl.day_accounts VALUES ('public', '2026-01-05', '{"raw": 1, "loaded": 1, "run_id": "3f59b1f8-f31a-4953-9f37-df5efb2553d5", "outside": 0, "rejected": {}, "warnings": null, "superseded": 0, "rejected_examples": {}}');
INSERT INTO etl.day_accounts VALUES ('public', '2026-01-06', '{"raw": 2, "loaded": 1, "run_id": "3dbd9fae-40c4-4214-b966-10b391d1add6", "outside": 0, "rejected": {}, "warnings": null, "superseded": 1, "rejected_examples": {}}');



INSERT INTO etl.import_events VALUES ('public', '00000000-0000-0000-0000-000000000001', '00000000-0000-0000-0000-000000000065', '2026-11-29 08:20:12.173524+00', 1);
INSERT INTO etl.import_events VALUES ('public', '00000000-0000-0000-0000-000000000002', '00000000-0000-0000-0000-000000000066', '2026-11-29 08:20:13.551922+00', 2);
INSERT INTO etl.import_events VALUES ('public', '00000000-0000-0000-0000-000000000003', '00000000-0000-0000-0000-000000000067', '2026-11-29 08:20:13.679161+00', 3);



INSERT INTO etl.import_requests VALUES ('public', '00000000-0000-0000-0000-000000000001', '2026-01-05', 1);
INSERT INTO etl.import_requests VALUES ('public', '00000000-0000-0000-0000-000000000001', '2026-01-06', 1);
INSERT INTO etl.import_requests VALUES ('public', '00000000-0000-0000-0000-000000000002', '2026-01-06', 2);
INSERT INTO etl.import_requests VALUES ('public', '00000000-0000-0000-0000-000000000003', '2026-01-07', 1);






INSERT INTO etl.installation VALUES ('a5d1025d-97fb-4596-a473-79715ad7cabc');






INSERT INTO etl.ledger VALUES ('public', 'orders', '2026-01-05', 1, 1, '2026-11-29 08:20:12.264586+00', '2026-11-29 08:20:13.305723+00', '3f59b1f8-f31a-4953-9f37-df5efb2553d5', false, 0, NULL, NULL, NULL, 0, 1, '841617ae75e74fd4010baa2377dbc849', 'whole');
INSERT INTO etl.ledger VALUES ('public', 'customers', '2026-01-05', 1, 1, '2026-11-29 08:20:13.305758+00', '2026-11-29 08:20:13.418396+00', '3f59b1f8-f31a-4953-9f37-df5efb2553d5', false, 0, NULL, NULL, NULL, 0, 0, '841617ae75e74fd4010baa2377dbc849', 'whole');
INSERT INTO etl.ledger VALUES ('public', 'leads', '2026-01-05', 1, 1, '2026-11-29 08:20:13.418439+00', '2026-11-29 08:20:13.536804+00', '3f59b1f8-f31a-4953-9f37-df5efb2553d5', false, 0, NULL, NULL, NULL, 0, 0, '841617ae75e74fd4010baa2377dbc849', 'whole');
INSERT INTO etl.ledger VALUES ('public', 'leads', '2026-01-06', 1, 1, '2026-11-29 08:20:13.418465+00', '2026-11-29 08:20:13.536821+00', '3f59b1f8-f31a-4953-9f37-df5efb2553d5', false, 0, NULL, NULL, NULL, 0, 0, '841617ae75e74fd4010baa2377dbc849', 'whole');
INSERT INTO etl.ledger VALUES ('public', 'orders', '2026-01-06', 2, 2, '2026-11-29 08:20:13.570529+00', '2026-11-29 08:20:13.663734+00', '3dbd9fae-40c4-4214-b966-10b391d1add6', false, 0, NULL, NULL, NULL, 0, 2, '841617ae75e74fd4010baa2377dbc849', 'changed');
INSERT INTO etl.ledger VALUES ('public', 'customers', '2026-01-06', 2, 1, '2026-11-29 08:20:13.66376+00', '2026-11-29 08:20:13.418457+00', '3f59b1f8-f31a-4953-9f37-df5efb2553d5', false, 0, NULL, NULL, NULL, 1, 2, '841617ae75e74fd4010baa2377dbc849', 'whole');
INSERT INTO etl.ledger VALUES ('public', 'customers', '2026-01-07', 0, 0, NULL, NULL, NULL, false, 0, NULL, NULL, NULL, 0, 0, NULL, NULL);
INSERT INTO etl.ledger VALUES ('public', 'leads', '2026-01-07', 0, 0, NULL, NULL, NULL, false, 0, NULL, NULL, NULL, 0, 0, NULL, NULL);
INSERT INTO etl.ledger VALUES ('public', 'orders', '2026-01-07', 1, 0, '2026-11-29 08:20:13.687451+00', NULL, NULL, false, 0, NULL, NULL, NULL, 0, 1, NULL, NULL);






INSERT INTO etl.order_index VALUES ('public', '00000000-0000-4000-8000-000000000001', 'A-1', '张三', '00000000-0000-4000-8000-000000000001:张三', '2026-01-05');
INSERT INTO etl.order_index VALUES ('public', '00000000-0000-4000-8000-000000000001', 'A-2', '李四', '00000000-0000-4000-8000-000000000001:李四', '2026-01-06');



INSERT INTO etl.outbox VALUES (1, '041385f1-edbd-4c4b-8cce-8f3d4b456d53', 'orders', '{"run_id": "3f59b1f8-f31a-4953-9f37-df5efb2553d5", "status": "success", "target": "public", "event_id": "041385f1-edbd-4c4b-8cce-8f3d4b456d53", "downstream": "included", "import_ids": ["00000000-0000-0000-0000-000000000001"], "partitions": ["2026-01-05", "2026-01-06"], "error_count": 0, "occurred_at": "2026-11-29T08:20:13.297803+00:00", "installation": "a5d1025d-97fb-4596-a473-79715ad7cabc", "event_version": "1.0", "success_count": 2, "duration_seconds": 0.977}', '2026-11-29 08:20:12.307946+00', NULL, NULL);
INSERT INTO etl.outbox VALUES (2, '2aca1c6f-83dd-4526-8b6c-f14d46b38e1f', 'customers', '{"run_id": "3f59b1f8-f31a-4953-9f37-df5efb2553d5", "status": "success", "target": "public", "event_id": "2aca1c6f-83dd-4526-8b6c-f14d46b38e1f", "downstream": "included", "import_ids": ["00000000-0000-0000-0000-000000000001"], "partitions": ["2026-01-05", "2026-01-06"], "error_count": 0, "occurred_at": "2026-11-29T08:20:13.399386+00:00", "installation": "a5d1025d-97fb-4596-a473-79715ad7cabc", "event_version": "1.0", "success_count": 2, "duration_seconds": 0.079}', '2026-11-29 08:20:13.313363+00', NULL, NULL);
INSERT INTO etl.outbox VALUES (3, 'dd8e0208-4408-4784-945f-427e54a25c9d', 'leads', '{"run_id": "3f59b1f8-f31a-4953-9f37-df5efb2553d5", "status": "success", "target": "public", "event_id": "dd8e0208-4408-4784-945f-427e54a25c9d", "downstream": "pending", "import_ids": ["00000000-0000-0000-0000-000000000001"], "partitions": ["2026-01-05", "2026-01-06"], "error_count": 0, "occurred_at": "2026-11-29T08:20:13.508384+00:00", "installation": "a5d1025d-97fb-4596-a473-79715ad7cabc", "event_version": "1.0", "success_count": 2, "duration_seconds": 0.079}', '2026-11-29 08:20:13.486502+00', NULL, NULL);
INSERT INTO etl.outbox VALUES (4, 'b2f30f98-5a22-4bc1-bd6a-329cb3df5525', 'orders', '{"run_id": "3dbd9fae-40c4-4214-b966-10b391d1add6", "status": "success", "target": "public", "event_id": "b2f30f98-5a22-4bc1-bd6a-329cb3df5525", "downstream": "pending", "import_ids": ["00000000-0000-0000-0000-000000000002"], "partitions": ["2026-01-06"], "error_count": 0, "occurred_at": "2026-11-29T08:20:13.660702+00:00", "installation": "a5d1025d-97fb-4596-a473-79715ad7cabc", "event_version": "1.0", "success_count": 1, "duration_seconds": 0.082}', '2026-11-29 08:20:13.576833+00', NULL, NULL);






INSERT INTO etl.schema_version VALUES ('0009');



INSERT INTO etl.stale_customers VALUES (1, 'public', 'customers', '00000000-0000-4000-8000-000000000001:李四', '2026-01-06');
INSERT INTO etl.stale_customers VALUES (2, 'public', 'leads', '00000000-0000-4000-8000-000000000001:李四', '2026-01-06');






INSERT INTO etl.waiting_events VALUES ('public', '00000000-0000-0000-0000-000000000004', '00000000-0000-0000-0000-000000000068', false, 4, '2026-11-29 08:20:13.698158+00', 0, '2026-11-29 08:20:13.698314+00');



INSERT INTO public.business_leads VALUES ('f8a60db9-c4fd-556a-b456-c5196259cff1', '8934d1a7-02d2-5713-ac86-c5175b7bb83c', 1, 'WON', '2026-01-06 04:00:00+00', '2026-01-06 04:00:00+00', '2026-01-06 04:00:00+00', 'etl', 0, 0, 1, 0.00, 0.00, 120.50, NULL, NULL, '2026-11-29 08:20:13.42006+00', '2026-11-29 08:20:13.42006+00');
INSERT INTO public.business_leads VALUES ('fd4ef8d1-2684-5631-8acd-3c839ea84862', 'fa55f60f-e32c-5a53-a54e-925cf73a97da', 1, 'WON', '2026-01-05 04:00:00+00', '2026-01-05 04:00:00+00', '2026-01-05 04:00:00+00', 'etl', 0, 0, 1, 0.00, 0.00, 120.50, NULL, NULL, '2026-11-29 08:20:13.42006+00', '2026-11-29 08:20:13.42006+00');



INSERT INTO public.customers VALUES ('fa55f60f-e32c-5a53-a54e-925cf73a97da', '00000000-0000-4000-8000-000000000001:张三', '00000000-0000-4000-8000-000000000001', '张三', '2026-01-05 04:00:00+00', '2026-01-05 04:00:00+00', 1, 120.50, 0, 0, 1, 0.00, 0.00, 120.50, '2026-11-29 08:20:13.313363+00', '2026-11-29 08:20:13.313363+00');
INSERT INTO public.customers VALUES ('8934d1a7-02d2-5713-ac86-c5175b7bb83c', '00000000-0000-4000-8000-000000000001:李四', '00000000-0000-4000-8000-000000000001', '李四', '2026-01-06 04:00:00+00', '2026-01-06 04:00:00+00', 1, 120.50, 0, 0, 1, 0.00, 0.00, 120.50, '2026-11-29 08:20:13.313363+00', '2026-11-29 08:20:13.313363+00');



INSERT INTO public.import_tasks VALUES ('00000000-0000-0000-0000-000000000001', 'test', 'completed', 2, '2026-11-29 08:20:12.162106+00', '2026-06-01 00:00:00+00');
INSERT INTO public.import_tasks VALUES ('00000000-0000-0000-0000-000000000002', 'test', 'completed', 1, '2026-11-29 08:20:13.546084+00', '2026-06-01 00:00:00+00');
INSERT INTO public.import_tasks VALUES ('00000000-0000-0000-0000-000000000003', 'test', 'completed', 1, '2026-11-29 08:20:13.667499+00', '2026-06-01 00:00:00+00');
INSERT INTO public.import_tasks VALUES ('00000000-0000-0000-0000-000000000004', 'test', 'pending', 2, '2026-11-29 08:20:13.69158+00', NULL);



INSERT INTO public.order_type_mappings VALUES ('打样订单', 'SAMPLE');
INSERT INTO public.order_type_mappings VALUES ('产前样订单', 'PROOF');
INSERT INTO public.order_type_mappings VALUES ('大货订单', 'BULK');



INSERT INTO public.orders VALUES ('00000000-0000-4000-8000-000000000001', 'A-1', '张三', 'completed', '大货订单', 'BULK', 120.50, 2, '2026-01-05 04:00:00+00', '2026-01-05', '00000000-0000-0000-0000-000000000001', 1, '2026-11-29 08:20:12.307946+00', '2026-11-29 08:20:12.307946+00');
INSERT INTO public.orders VALUES ('00000000-0000-4000-8000-000000000001', 'A-2', '李四', 'cancelled', '大货订单', 'BULK', 120.50, 2, '2026-01-06 04:00:00+00', '2026-01-06', '00000000-0000-0000-0000-000000000002', 3, '2026-11-29 08:20:12.307946+00', '2026-11-29 08:20:13.576833+00');



INSERT INTO public.raw_orders VALUES (1, '00000000-0000-0000-0000-000000000001', 'A-1', '旗舰店', '张三', '大货订单', 'completed', 120.50, 2, '2026-01-05 04:00:00+00', NULL);
INSERT INTO public.raw_orders VALUES (2, '00000000-0000-0000-0000-000000000001', 'A-2', '旗舰店', '李四', '大货订单', 'completed', 120.50, 2, '2026-01-06 04:00:00+00', NULL);
INSERT INTO public.raw_orders VALUES (3, '00000000-0000-0000-0000-000000000002', 'A-2', '旗舰店', '李四', '大货订单', 'cancelled', 120.50, 2, '2026-01-06 04:00:00+00', NULL);
INSERT INTO public.raw_orders VALUES (4, '00000000-0000-0000-0000-000000000003', 'A-3', '旗舰店', '王五', '大货订单', 'completed', 120.50, 2, '2026-01-07 04:00:00+00', NULL);
INSERT INTO public.raw_orders VALUES (5, '00000000-0000-0000-0000-000000000004', 'A-1', '旗舰店', '张三', '大货订单', 'completed', 99.00, 2, '2026-01-05 04:00:00+00', NULL);
INSERT INTO public.raw_orders VALUES (6, '00000000-0000-0000-0000-000000000004', 'A-4', '旗舰店', '张三', '大货订单', 'completed', 120.50, 2, '2026-01-08 04:00:00+00', NULL);



INSERT INTO public.shop_configs VALUES ('00000000-0000-4000-8000-000000000001', '旗舰店', 'test');



SELECT pg_catalog.setval('etl.outbox_outbox_id_seq', 4, true);



SELECT pg_catalog.setval('etl.stale_customers_mark_id_seq', 2, true);



SELECT pg_catalog.setval('public.raw_orders_raw_id_seq', 6, true);



ALTER TABLE ONLY etl.cold_sweeps
    ADD CONSTRAINT cold_sweeps_pkey PRIMARY KEY (target);



ALTER TABLE ONLY etl.counted_imports
    ADD CONSTRAINT counted_imports_pkey PRIMARY KEY (target, day, import_id);



ALTER TABLE ONLY etl.day_accounts
    ADD CONSTRAINT day_accounts_pkey PRIMARY KEY (target, day);



ALTER TABLE ONLY etl.import_events
    ADD CONSTRAINT import_events_pkey PRIMARY KEY (target, import_id);



ALTER TABLE ONLY etl.import_requests
    ADD CONSTRAINT import_requests_pkey PRIMARY KEY (target, import_id, day);



ALTER TABLE ONLY etl.import_watches
    ADD CONSTRAINT import_watches_pkey PRIMARY KEY (target);



ALTER TABLE ONLY etl.installation
    ADD CONSTRAINT installation_pkey PRIMARY KEY (installation_id);



ALTER TABLE ONLY etl.leases
    ADD CONSTRAINT leases_pkey PRIMARY KEY (run_id);



ALTER TABLE ONLY etl.ledger
    ADD CONSTRAINT ledger_pkey PRIMARY KEY (target, asset, day);



ALTER TABLE ONLY etl.locks
    ADD CONSTRAINT locks_pkey PRIMARY KEY (target, kind, key);



ALTER TABLE ONLY etl.order_index
    ADD CONSTRAINT order_index_pkey PRIMARY KEY (shop_id, order_id, target);



ALTER TABLE ONLY etl.outbox
    ADD CONSTRAINT outbox_pkey PRIMARY KEY (outbox_id);



ALTER TABLE ONLY etl.rejected_rows
    ADD CONSTRAINT rejected_rows_pkey PRIMARY KEY (target, raw_id);



ALTER TABLE ONLY etl.schema_version
    ADD CONSTRAINT schema_version_pkc PRIMARY KEY (version_num);



ALTER TABLE ONLY etl.stale_customers
    ADD CONSTRAINT stale_customers_pkey PRIMARY KEY (mark_id);



ALTER TABLE ONLY etl.troubles
    ADD CONSTRAINT troubles_pkey PRIMARY KEY (process, task);



ALTER TABLE ONLY etl.waiting_events
    ADD CONSTRAINT waiting_events_pkey PRIMARY KEY (target, import_id, event_id);



ALTER TABLE ONLY public.business_leads
    ADD CONSTRAINT business_leads_customer_global_id_lead_no_key UNIQUE (customer_global_id, lead_no);



ALTER TABLE ONLY public.business_leads
    ADD CONSTRAINT business_leads_pkey PRIMARY KEY (lead_id);



ALTER TABLE ONLY public.customers
    ADD CONSTRAINT customers_customer_key_key UNIQUE (customer_key);



ALTER TABLE ONLY public.customers
    ADD CONSTRAINT customers_pkey PRIMARY KEY (customer_global_id);



ALTER TABLE ONLY public.import_tasks
    ADD CONSTRAINT import_tasks_pkey PRIMARY KEY (import_id);



ALTER TABLE ONLY public.order_type_mappings
    ADD CONSTRAINT order_type_mappings_pkey PRIMARY KEY (raw_order_type);



ALTER TABLE ONLY public.orders
    ADD CONSTRAINT orders_pkey PRIMARY KEY (shop_id, order_id);



ALTER TABLE ONLY public.raw_orders
    ADD CONSTRAINT raw_orders_pkey PRIMARY KEY (raw_id);



ALTER TABLE ONLY public.shop_configs
    ADD CONSTRAINT shop_configs_pkey PRIMARY KEY (shop_id);



ALTER TABLE ONLY public.shop_configs
    ADD CONSTRAINT shop_configs_shop_name_key UNIQUE (shop_name);



CREATE INDEX ix_import_requests_day ON etl.import_requests USING btree (target, day, revision);



CREATE INDEX ix_ledger_due ON etl.ledger USING btree (target, day) WHERE (requested > materialized);



CREATE INDEX ix_ledger_materialized_at ON etl.ledger USING btree (target, asset, materialized_at);



CREATE INDEX ix_order_index_customer ON etl.order_index USING btree (hashtextextended(customer_key, (0)::bigint));



CREATE INDEX ix_order_index_order_date ON etl.order_index USING btree (order_date);



CREATE INDEX ix_rejected_rows_day ON etl.rejected_rows USING btree (target, day);



CREATE INDEX ix_rejected_rows_import ON etl.rejected_rows USING btree (target, import_id);



CREATE INDEX ix_stale_customers ON etl.stale_customers USING btree (target, asset, day);



CREATE INDEX ix_waiting_events_look_at ON etl.waiting_events USING btree (target, look_at);



CREATE INDEX ix_business_leads_left_behind ON public.business_leads USING btree (customer_global_id) WHERE ((lead_no IS NOT NULL) AND (((closed_at IS NULL) AND (COALESCE(current_stage, ''::text) <> 'OPEN'::text) AND (COALESCE(current_stage, ''::text) <> 'COLD'::text)) OR ((last_order_at IS NULL) AND (NOT (((COALESCE(closed_by, ''::text) = 'user'::text) AND (closed_at IS NOT NULL)) OR ((((COALESCE(closed_by, ''::text) = 'user'::text) AND (closed_at IS NOT NULL)) OR (COALESCE(btrim(owner, '	

                  　'::text), ''::text) <> ''::text) OR (COALESCE(btrim(notes, '	

                  　'::text), ''::text) <> ''::text)) AND (COALESCE(current_stage, ''::text) = 'OPEN'::text) AND (closed_at IS NULL) AND (closed_by IS NULL)))))));



CREATE INDEX ix_business_leads_unclosed ON public.business_leads USING btree (current_stage, last_order_at) WHERE (closed_at IS NULL);



CREATE INDEX ix_import_tasks_completed_at ON public.import_tasks USING btree (completed_at);



CREATE INDEX ix_public_orders_order_date ON public.orders USING btree (order_date);



CREATE INDEX ix_raw_orders_import_id ON public.raw_orders USING btree (import_id);



CREATE INDEX ix_raw_orders_order ON public.raw_orders USING btree ("left"(btrim(order_id, '	

                  　'::text), 501));



CREATE INDEX ix_raw_orders_ordered_at ON public.raw_orders USING btree (ordered_at);





