-- What the daemon asks and tells the control plane, one statement a section.

-- name: read_control
-- seconds_left is what remains of the ttl, null where there is none.
SELECT mode, rate, blind, requested_at, requested_by,
       extract(epoch FROM requested_at + ttl - clock_timestamp()) AS seconds_left,
       incidentd.daemons() AS daemons
  FROM incidentd.demo_control;

-- name: back_to_normal
-- Only if nobody has asked for something else since.
UPDATE incidentd.demo_control
   SET mode = 'normal'
 WHERE mode = :mode AND requested_at = :requested_at;

-- name: join_daemons
SELECT pg_advisory_lock_shared(1768842084, 2);

-- name: announce
-- Tells the other daemons that one has come or gone.
SELECT pg_notify('demo_control', '');

-- name: try_to_lead
SELECT pg_try_advisory_lock(1768842084, 1) AS leading;

-- name: stop_leading
SELECT pg_advisory_unlock(1768842084, 1);

-- name: begin_run
INSERT INTO incidentd.incident_log (mode, requested_at, requested_by, undo, parameters, fingerprint_before)
VALUES (:mode, :requested_at, :requested_by, :undo, :parameters, :fingerprint)
RETURNING id;

-- name: keep_parameters
UPDATE incidentd.incident_log SET parameters = :parameters WHERE id = :id;

-- name: injected
UPDATE incidentd.incident_log SET injected_at = clock_timestamp(), parameters = :parameters WHERE id = :id;

-- name: witnessed
UPDATE incidentd.incident_log SET witnessed_at = clock_timestamp(), evidence = :evidence WHERE id = :id;

-- name: mitigated
UPDATE incidentd.incident_log SET mitigated_at = clock_timestamp() WHERE id = :id AND mitigated_at IS NULL;

-- name: finish_run
UPDATE incidentd.incident_log
   SET recovered_at = CASE WHEN :clean::boolean THEN clock_timestamp() END,
       outcome = :outcome, error = :error, fingerprint_after = :fingerprint, residue = :residue
 WHERE id = :id;

-- name: failed_to_start
INSERT INTO incidentd.incident_log (mode, requested_at, requested_by, outcome, error)
VALUES (:mode, :requested_at, :requested_by, 'failed', :error);

-- name: end_sessions
-- Sessions of a leader that died: only leaders have any of these, and the one that asks has none yet.
SELECT application_name, pid, pg_terminate_backend(pid, 2000) AS ended
  FROM pg_stat_activity
 WHERE datname = current_database()
   AND pid <> pg_backend_pid()
   AND (usename::text, application_name) IN (SELECT role, application_name
                                               FROM jsonb_to_recordset(:actors) AS actor (role text, application_name text));

-- name: surplus_sessions
-- Actors with more sessions than they should have.
SELECT actor.role, actor.application_name, count(*) AS sessions, max(actor.sessions) AS expected
  FROM jsonb_to_recordset(:actors) AS actor (role text, application_name text, sessions integer)
  JOIN pg_stat_activity AS session ON session.usename = actor.role AND session.application_name = actor.application_name
 WHERE session.datname = current_database()
 GROUP BY actor.role, actor.application_name
HAVING count(*) > max(actor.sessions)
 ORDER BY actor.role, actor.application_name;

-- name: database_size
SELECT pg_database_size(current_database()) AS bytes;

-- name: unfinished_runs
SELECT id, mode, requested_at, undo, parameters, fingerprint_before
  FROM incidentd.incident_log
 WHERE outcome IS NULL
 ORDER BY id DESC;

-- name: forget_incidents
DELETE FROM incidentd.incident WHERE name <> ALL (:names::text[]);

-- name: publish_incident
INSERT INTO incidentd.incident (name, title, category, severity, cause, fix, traps, requires, scope, signals, sha256, refusal)
VALUES (:name, :title, :category, :severity, :cause, :fix,
        ARRAY(SELECT jsonb_array_elements_text(:traps::jsonb)), ARRAY(SELECT jsonb_array_elements_text(:requires::jsonb)),
        :scope, :signals, :sha256, :refusal)
    ON CONFLICT (name) DO UPDATE
   SET title = excluded.title, category = excluded.category, severity = excluded.severity, cause = excluded.cause,
       fix = excluded.fix, traps = excluded.traps, requires = excluded.requires, scope = excluded.scope,
       signals = excluded.signals, sha256 = excluded.sha256, refusal = excluded.refusal, loaded_at = clock_timestamp();

-- name: list_incidents
SELECT name, sha256 FROM incidentd.incident ORDER BY name;

-- name: missing_requirements
-- What of `requires` this server does not offer: an attribute of the migrator's role, or a predefined role.
SELECT name
  FROM jsonb_array_elements_text(:requires::jsonb) AS name
 WHERE NOT CASE
           WHEN name = 'superuser'   THEN (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)
           WHEN name = 'replication' THEN (SELECT rolreplication OR rolsuper FROM pg_roles WHERE rolname = current_user)
           WHEN EXISTS (SELECT FROM pg_roles WHERE rolname = name) THEN pg_has_role(current_user, name, 'usage')
           ELSE EXISTS (SELECT FROM pg_extension WHERE extname = name)
       END;

-- name: become_migrator
-- Changes of the story are made by the migration tool: its role, its name, its patience.
SELECT set_config('role', 'migrator', :local), set_config('application_name', 'flyway', :local),
       set_config('lock_timeout', '5s', :local), set_config('statement_timeout', '15min', :local);

-- name: become_control
SELECT set_config('role', 'none', :local), set_config('application_name', 'control-plane', :local),
       set_config('lock_timeout', '5s', :local), set_config('statement_timeout', '10s', :local);

-- name: be_seen
-- Whether pg_stat_activity and pg_stat_statements tell of this session: only a superuser may choose.
SELECT set_config(name, CASE name WHEN 'track_activities' THEN :activities ELSE :statements END, :local)
  FROM pg_settings
 WHERE name IN ('track_activities', 'pg_stat_statements.track')
   AND (SELECT rolsuper FROM pg_roles WHERE rolname = session_user);

-- name: become
SELECT set_config('role', :role, true);
