/*---
title    = "The change fails half-way, and what was done of it is committed"
category = "tests"
severity = "low"
cause    = "A test."
fix      = "None."
witness_within = "2s"
---*/

-- name: inject
-- transaction: none
ALTER TABLE outbox SET (fillfactor = 50);
SELECT 1 / (count(*) - count(*)) FROM outbox;

-- name: recover
ALTER TABLE outbox RESET (fillfactor);

-- name: evidence
SELECT true AS visible;
