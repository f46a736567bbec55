/*---
title    = "Settlement batch locks the busiest merchants while it calls the acquirer"
category = "locks"
severity = "high"
cause    = "The nightly settlement batch was moved into business hours; it holds FOR UPDATE locks on the accounts of the busiest merchants across an API call to the acquirer."
fix      = "Call the acquirer outside the transaction, or lock FOR NO KEY UPDATE SKIP LOCKED."
traps    = ["raising max_connections or the pool size", "killing the waiting payments", "adding an index on accounts"]
witness_within = "5s"

[actor.settlement]
sessions = 2

[signals]
promql  = ['sum(pg_stat_activity_count{wait_event_type="Lock"}) > 0']
logql   = ['{app="postgres"} |= "still waiting for" |= "Lock on"']
traceql = ['{ resource.service.name = "payment-service" && name = "create_payment" && duration > 1s }']
---*/

-- name: settlement
BEGIN;
SELECT sum(balance) AS payout
  FROM (SELECT balance FROM accounts WHERE merchant_id = :hot_merchant_id ORDER BY id FOR UPDATE) AS locked;
-- think: 2s..6s
UPDATE accounts SET balance = 0 WHERE merchant_id = :hot_merchant_id;
INSERT INTO settlements (merchant_id, amount) VALUES (:hot_merchant_id, :payout);
COMMIT;
-- think: 100ms..300ms

-- name: evidence
-- Payments have waited for half a second or more behind a settlement that does nothing itself.
SELECT count(*) > 0 AS visible,
       count(*) AS blocked_payments,
       max(clock_timestamp() - payment.query_start) AS longest_wait,
       array_agg(DISTINCT settlement.pid) AS blocked_by
  FROM pg_stat_activity AS payment
  JOIN pg_stat_activity AS settlement ON settlement.pid = ANY (pg_blocking_pids(payment.pid))
 WHERE payment.application_name = 'payments-api'
   AND payment.wait_event_type = 'Lock'
   AND payment.query_start < clock_timestamp() - interval '500 milliseconds'
   AND settlement.application_name = 'settlement-worker'
   AND settlement.state = 'idle in transaction';
