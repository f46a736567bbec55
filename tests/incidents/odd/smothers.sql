/*---
title    = "No connection is left, no payment can be written, no CPU is free"
category = "tests"
severity = "low"
cause    = "A test."
fix      = "None."
witness_within = "2s"

[actor.scorer]
sessions         = 80
role             = "fraud_scorer"
application_name = "fraud-scorer"

[actor.locker]
sessions         = 2
role             = "migrator"
application_name = "flyway"
---*/

-- name: scorer
SELECT count(*) FROM merchants AS a, merchants AS b WHERE a.name < b.name;

-- name: locker
BEGIN;
LOCK TABLE payments, accounts, outbox IN ACCESS EXCLUSIVE MODE;
-- think: 3s
COMMIT;

-- name: evidence
SELECT count(*) > 20 AS visible FROM pg_stat_activity WHERE application_name = 'fraud-scorer';
