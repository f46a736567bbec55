-- How a database becomes ours: looked at first, claimed only when empty, filled once.

-- name: try_to_lock
SELECT pg_try_advisory_lock(1768842084, 3) AS locked;

-- name: lock
SELECT pg_advisory_lock(1768842084, 3);

-- name: unlock
SELECT pg_advisory_unlock(1768842084, 3);

-- name: foreign_tables
-- Tables of somebody else's: any, as long as the database does not carry our mark.
SELECT format('%I.%I', namespace.nspname, relation.relname) AS name
  FROM pg_class AS relation
  JOIN pg_namespace AS namespace ON namespace.oid = relation.relnamespace
 WHERE relation.relkind IN ('r', 'p', 'm', 'v', 'f', 'S')
   AND namespace.nspname NOT LIKE 'pg\_%'
   AND namespace.nspname <> 'information_schema'
   AND NOT EXISTS (SELECT FROM pg_depend WHERE classid = 'pg_class'::regclass AND objid = relation.oid AND deptype = 'e')
 ORDER BY name
 LIMIT 3;

-- name: has_mark
SELECT to_regclass('incidentd.installation') IS NOT NULL AS marked;

-- name: read_mark
SELECT mark.system_identifier = control.system_identifier::text
       AND mark.database_oid = (SELECT oid FROM pg_database WHERE datname = current_database()) AS ours,
       mark.schema_sha256, mark.payments, mark.seeded_at
  FROM incidentd.installation AS mark, pg_control_system() AS control;

-- name: claim
INSERT INTO incidentd.installation (system_identifier, database_oid)
SELECT control.system_identifier::text, (SELECT oid FROM pg_database WHERE datname = current_database())
  FROM pg_control_system() AS control
    ON CONFLICT DO NOTHING;

-- name: schema_applied
UPDATE incidentd.installation SET schema_sha256 = :sha256;

-- name: seeded
UPDATE incidentd.installation SET payments = :payments, seeded_at = clock_timestamp();

-- name: foreign_roles
-- Roles of the story's names that were here before us: their passwords and settings are not ours to change.
SELECT rolname AS name
  FROM pg_roles
 WHERE rolname IN ('payments_owner', 'payments_app', 'settlement_app', 'outbox_publisher', 'fraud_scorer', 'bi_reader', 'migrator', 'investigator')
   AND shobj_description(oid, 'pg_authid') IS DISTINCT FROM 'payment service'
 ORDER BY name;

-- name: can_install
SELECT rolsuper OR (rolcreaterole AND has_database_privilege(current_database(), 'CREATE')) AS can_install,
       rolsuper AS superuser, current_user AS name
  FROM pg_roles
 WHERE rolname = current_user;

-- name: login_roles
SELECT rolname AS name FROM pg_roles WHERE rolcanlogin AND shobj_description(oid, 'pg_authid') = 'payment service' ORDER BY name;

-- name: role_password
SELECT role_password FROM incidentd.installation;

-- name: set_password
-- ALTER ROLE takes no parameters, hence the detour; the verifier is SCRAM's, never the password.
SELECT set_config('incidentd.role', :role, true), set_config('incidentd.verifier', :verifier, true);
DO $$
BEGIN
    EXECUTE format('ALTER ROLE %I PASSWORD %L', current_setting('incidentd.role'), current_setting('incidentd.verifier'));
END
$$;

-- name: keep_password
UPDATE incidentd.installation SET role_password = :password;

-- name: population
-- Who can be paid, and how often each merchant is.
SELECT account.id AS account_id, account.merchant_id, merchant.monthly_volume AS weight
  FROM public.accounts AS account
  JOIN public.merchants AS merchant ON merchant.id = account.merchant_id
 ORDER BY account.merchant_id, account.id;
