/*---
title    = "The change fails half-way, in a transaction"
category = "tests"
severity = "low"
cause    = "A test."
fix      = "None."
witness_within = "2s"
---*/

-- name: inject
ALTER TABLE outbox SET (fillfactor = 50);
SELECT 1 / (count(*) - count(*)) FROM outbox;

-- name: recover
ALTER TABLE outbox RESET (fillfactor);

-- name: evidence
SELECT true AS visible;
