/*---
title    = "Its own stop condition comes true"
category = "tests"
severity = "low"
cause    = "A test."
fix      = "None."
witness_within = "2s"

[actor.scorer]
sessions         = 1
role             = "fraud_scorer"
application_name = "fraud-scorer"
---*/

-- name: scorer
SELECT count(*) FROM merchants;
-- think: 100ms

-- name: evidence
SELECT count(*) > 0 AS visible FROM pg_stat_activity WHERE application_name = 'fraud-scorer';

-- name: stop
SELECT count(*) > 0 AS stop
  FROM pg_stat_activity
 WHERE application_name = 'fraud-scorer' AND backend_start < clock_timestamp() - interval '1 second';
