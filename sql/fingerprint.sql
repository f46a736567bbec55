-- Everything that an incident could leave behind, one row an object: equal rows before and after mean that nothing was.
-- Sizes are in bytes and grow with the payments; they are compared within a bound.

-- name: fingerprint
WITH relation AS (
    SELECT class.*, format('%I.%I', namespace.nspname, class.relname) AS name
      FROM pg_class AS class
      JOIN pg_namespace AS namespace ON namespace.oid = class.relnamespace
     WHERE namespace.nspname NOT LIKE 'pg\_%' AND namespace.nspname NOT IN ('information_schema', 'incidentd')
), object (kind, name, definition) AS (
    SELECT 'schema', nspname::text, concat_ws(' ', nspowner::regrole, nspacl)
      FROM pg_namespace WHERE nspname NOT LIKE 'pg\_%' AND nspname NOT IN ('information_schema', 'incidentd')
    UNION ALL
    SELECT CASE relkind WHEN 'i' THEN 'index' WHEN 'I' THEN 'index' WHEN 'S' THEN 'sequence' WHEN 'v' THEN 'view' ELSE 'table' END,
           name, concat_ws(' ', relkind, relpersistence, relowner::regrole, relacl, reloptions, relreplident,
                           relrowsecurity, relforcerowsecurity, reltablespace, relispartition, pg_get_expr(relpartbound, oid))
      FROM relation
    UNION ALL
    SELECT 'size of table', name, pg_total_relation_size(oid)::text FROM relation WHERE relkind IN ('r', 'm', 't')
    UNION ALL
    SELECT 'index definition', relation.name, concat_ws(' ', pg_get_indexdef(indexrelid), indisvalid, indisready, indisreplident, indisclustered)
      FROM pg_index JOIN relation ON relation.oid = indexrelid
    UNION ALL
    SELECT 'column', format('%s.%I', relation.name, attname),
           concat_ws(' ', format_type(atttypid, atttypmod), attnotnull, attidentity, attgenerated, attstorage, attstattarget,
                     attacl, attoptions, pg_get_expr(adbin, adrelid))
      FROM pg_attribute JOIN relation ON relation.oid = attrelid AND relkind IN ('r', 'p', 'v', 'm', 'f')
      LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
     WHERE attnum > 0 AND NOT attisdropped
    UNION ALL
    SELECT 'constraint', format('%s.%I', relation.name, conname), concat_ws(' ', pg_get_constraintdef(pg_constraint.oid), convalidated)
      FROM pg_constraint JOIN relation ON relation.oid = conrelid
    UNION ALL
    SELECT 'trigger', format('%s.%I', relation.name, tgname), concat_ws(' ', pg_get_triggerdef(pg_trigger.oid), tgenabled)
      FROM pg_trigger JOIN relation ON relation.oid = tgrelid WHERE NOT tgisinternal
    UNION ALL
    SELECT 'sequence limits', relation.name, concat_ws(' ', seqtypid::regtype, seqstart, seqmin, seqmax, seqincrement, seqcycle, seqcache)
      FROM pg_sequence JOIN relation ON relation.oid = seqrelid
    UNION ALL
    SELECT 'view definition', name, pg_get_viewdef(oid) FROM relation WHERE relkind IN ('v', 'm')
    UNION ALL
    SELECT 'policy', format('%s.%I', relation.name, polname), concat_ws(' ', polcmd, polpermissive, pg_get_expr(polqual, polrelid), pg_get_expr(polwithcheck, polrelid))
      FROM pg_policy JOIN relation ON relation.oid = polrelid
    UNION ALL
    SELECT 'function', pg_proc.oid::regprocedure::text, concat_ws(' ', md5(prosrc || coalesce(pg_get_function_sqlbody(pg_proc.oid), '')), proowner::regrole, proacl, proconfig)
      FROM pg_proc JOIN pg_namespace ON pg_namespace.oid = pronamespace
     WHERE nspname NOT LIKE 'pg\_%' AND nspname NOT IN ('information_schema', 'incidentd')
    UNION ALL
    SELECT 'role', rolname::text, concat_ws(' ', rolsuper, rolinherit, rolcreaterole, rolcreatedb, rolcanlogin, rolreplication, rolbypassrls,
                                            rolconnlimit, rolvaliduntil,
                                            ARRAY(SELECT roleid::regrole::text FROM pg_auth_members WHERE member = pg_roles.oid ORDER BY 1))
      FROM pg_roles
    UNION ALL
    SELECT 'setting of', concat_ws(' in ', CASE WHEN setrole <> 0 THEN setrole::regrole::text ELSE 'everybody' END, datname),
           ARRAY(SELECT unnest(setconfig) ORDER BY 1)::text
      FROM pg_db_role_setting LEFT JOIN pg_database ON pg_database.oid = setdatabase
     WHERE setdatabase = 0 OR datname = current_database()
    UNION ALL
    SELECT 'database', datname::text, concat_ws(' ', datdba::regrole, datallowconn, datconnlimit, datacl)
      FROM pg_database WHERE datname = current_database()
    UNION ALL
    SELECT 'server setting', name, setting FROM pg_settings WHERE source = 'configuration file'
    UNION ALL
    SELECT 'extension', extname::text, extversion FROM pg_extension
    UNION ALL
    SELECT 'replication slot', slot_name::text, concat_ws(' ', slot_type, plugin, temporary) FROM pg_replication_slots
     WHERE database IS NULL OR database = current_database()
    UNION ALL
    SELECT 'prepared transaction', gid, owner::text FROM pg_prepared_xacts WHERE database = current_database()
    UNION ALL
    SELECT 'publication', pubname::text, concat_ws(' ', puballtables, pubinsert, pubupdate, pubdelete) FROM pg_publication
    UNION ALL
    SELECT 'event trigger', evtname::text, concat_ws(' ', evtevent, evtenabled) FROM pg_event_trigger
)
SELECT jsonb_object_agg(kind || ' ' || name, definition) AS fingerprint FROM object;
