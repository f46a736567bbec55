/*---
title    = "The recovery forgets an index"
category = "tests"
severity = "low"
cause    = "A test."
fix      = "None."
witness_within = "2s"
---*/

-- name: inject
ALTER TABLE outbox SET (fillfactor = 60);
CREATE INDEX forgotten_idx ON outbox (event);

-- name: recover
ALTER TABLE outbox RESET (fillfactor);

-- name: evidence
SELECT 'fillfactor=60' = ANY (reloptions) AS visible FROM pg_class WHERE oid = 'outbox'::regclass;
