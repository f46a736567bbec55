-- The control plane: what is wanted (demo_control), what can go wrong (incident), what happened (incident_log).
-- Applied whole whenever it has changed, by the owner of the database; every statement may run twice.
-- Parameters are not used here; the daemon reads the sections with the same loader as every other file.

-- name: schema
CREATE SCHEMA IF NOT EXISTS incidentd;

-- One row: this database is ours, on this very cluster. A copy of it elsewhere is not.
CREATE TABLE IF NOT EXISTS incidentd.installation (
    system_identifier text        NOT NULL,
    database_oid      oid         NOT NULL,
    claimed_at        timestamptz NOT NULL DEFAULT clock_timestamp(),
    schema_sha256     text,
    payments          bigint,
    role_password     text,
    seeded_at         timestamptz
);
CREATE UNIQUE INDEX IF NOT EXISTS installation_has_one_row ON incidentd.installation ((true));

-- The catalog as loaded. `refusal` is the reason why a mode cannot be asked for on this server, or null.
CREATE TABLE IF NOT EXISTS incidentd.incident (
    name      text        PRIMARY KEY,
    title     text        NOT NULL,
    category  text        NOT NULL,
    severity  text        NOT NULL,
    cause     text        NOT NULL,
    fix       text        NOT NULL,
    traps     text[]      NOT NULL,
    requires  text[]      NOT NULL,
    scope     text        NOT NULL,
    signals   jsonb       NOT NULL,
    sha256    text        NOT NULL,
    refusal   text,
    loaded_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- What is wanted, in one row. requested_at and requested_by say since when the mode is, and who asked for it.
CREATE TABLE IF NOT EXISTS incidentd.demo_control (
    mode         text             NOT NULL DEFAULT 'normal',
    rate         double precision NOT NULL DEFAULT 50,
    ttl          interval                  DEFAULT '15 minutes',
    blind        boolean          NOT NULL DEFAULT false,
    updated_at   timestamptz      NOT NULL DEFAULT clock_timestamp(),
    updated_by   text             NOT NULL DEFAULT session_user,
    requested_at timestamptz      NOT NULL DEFAULT clock_timestamp(),
    requested_by text             NOT NULL DEFAULT session_user
);
CREATE UNIQUE INDEX IF NOT EXISTS demo_control_has_one_row ON incidentd.demo_control ((true));

-- The ground truth, and the undo journal: `undo` is the recover script as it stood when the change was made, `parameters`
-- what its names were bound to. Both are written in the transaction of the change.
CREATE TABLE IF NOT EXISTS incidentd.incident_log (
    id                 bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    mode               text        NOT NULL,
    requested_at       timestamptz NOT NULL,
    requested_by       text        NOT NULL,
    injected_at        timestamptz,
    witnessed_at       timestamptz,
    mitigated_at       timestamptz,
    recovered_at       timestamptz,
    outcome            text        CHECK (outcome IN ('recovered', 'not_witnessed', 'aborted', 'failed', 'interrupted')),
    error              text,
    parameters         jsonb       NOT NULL DEFAULT '{}',
    evidence           jsonb,
    undo               text,
    fingerprint_before jsonb,
    fingerprint_after  jsonb,
    residue            jsonb
);
CREATE INDEX IF NOT EXISTS incident_log_unfinished ON incidentd.incident_log (id) WHERE outcome IS NULL;

-- Advisory locks say who is there: 1 is held by the daemon that leads, 2 is shared by every daemon, 3 guards installation.
CREATE OR REPLACE FUNCTION incidentd.daemons() RETURNS bigint
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT count(*)
      FROM pg_locks
     WHERE locktype = 'advisory'
       AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
       AND classid = 1768842084 AND objid = 2 AND objsubid = 2
       AND granted;
END;

CREATE OR REPLACE FUNCTION incidentd.check_demo_control() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    author  text := session_user || coalesce(' via ' || nullif(current_setting('application_name'), ''), '');
    refusal text;
BEGIN
    IF NEW.rate IS NULL OR NOT (NEW.rate > 0 AND NEW.rate <= 1000000) THEN
        RAISE EXCEPTION 'rate must be payments per second, more than 0 and at most 1000000, not %', coalesce(NEW.rate::text, 'null')
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF NEW.ttl IS NOT NULL AND NOT (NEW.ttl > interval '0' AND NEW.ttl <= interval '1 year') THEN
        RAISE EXCEPTION 'ttl must be more than 0 and at most a year, not %', NEW.ttl
            USING ERRCODE = 'invalid_parameter_value', HINT = 'NULL means that only you go back to normal.';
    END IF;
    IF NEW.blind IS NULL THEN
        RAISE EXCEPTION 'blind must be true or false, not null' USING ERRCODE = 'invalid_parameter_value';
    END IF;

    NEW.updated_at := clock_timestamp();
    NEW.updated_by := author;
    IF NEW.mode IS NOT DISTINCT FROM OLD.mode THEN
        NEW.requested_at := OLD.requested_at;
        NEW.requested_by := OLD.requested_by;
        RETURN NEW;
    END IF;

    IF NEW.mode IS DISTINCT FROM 'normal' THEN
        SELECT incident.refusal INTO refusal FROM incidentd.incident WHERE incident.name = NEW.mode;
        IF NOT FOUND THEN
            RAISE EXCEPTION 'there is no mode %', coalesce(quote_literal(left(NEW.mode, 80)), 'null')
                USING ERRCODE = 'invalid_parameter_value',
                      HINT = 'The modes are: normal, ' || coalesce((SELECT string_agg(name, ', ' ORDER BY name) FROM incidentd.incident), '');
        ELSIF refusal IS NOT NULL THEN
            RAISE EXCEPTION 'mode % cannot run here: %', quote_literal(NEW.mode), refusal USING ERRCODE = 'object_not_in_prerequisite_state';
        END IF;
    END IF;
    NEW.requested_at := NEW.updated_at;
    NEW.requested_by := author;
    RETURN NEW;
END
$$;

CREATE OR REPLACE FUNCTION incidentd.announce_demo_control() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM pg_notify('demo_control', '');
    IF incidentd.daemons() = 0 THEN
        RAISE WARNING 'no daemon is connected: this takes effect when one starts'
            USING HINT = 'Start one with: python -m incidentd';
    END IF;
    RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION incidentd.keep_one_row() RETURNS trigger
LANGUAGE plpgsql
AS $$
BEGIN
    RAISE EXCEPTION '% has exactly one row: UPDATE it', TG_TABLE_NAME USING ERRCODE = 'object_not_in_prerequisite_state';
END
$$;

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM incidentd.demo_control) THEN
        INSERT INTO incidentd.demo_control DEFAULT VALUES;
    END IF;
END
$$;

CREATE OR REPLACE TRIGGER check_demo_control BEFORE UPDATE ON incidentd.demo_control
    FOR EACH ROW EXECUTE FUNCTION incidentd.check_demo_control();
CREATE OR REPLACE TRIGGER announce_demo_control AFTER UPDATE ON incidentd.demo_control
    FOR EACH STATEMENT EXECUTE FUNCTION incidentd.announce_demo_control();
CREATE OR REPLACE TRIGGER keep_one_row BEFORE INSERT OR DELETE OR TRUNCATE ON incidentd.demo_control
    FOR EACH STATEMENT EXECUTE FUNCTION incidentd.keep_one_row();

-- The operator types `demo_control` without a prefix.
DO $$
BEGIN
    EXECUTE format('ALTER DATABASE %I SET search_path = public, incidentd', current_database());
END
$$;
