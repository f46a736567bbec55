/*---
title    = "Slow clients of a CSV export hold every connection of the payment pool"
category = "connections"
severity = "high"
cause    = "The new CSV export streams from a cursor through the payment API's own pool; slow clients keep their connection for many seconds between two chunks."
fix      = "Give exports a pool of their own, or read a chunk, give the connection back and only then write to the client."
traps    = ["raising max_connections", "a bigger or faster database server", "killing idle-in-transaction sessions one by one"]
witness_within = "5s"

[actor.export]
share = 0.2

[signals]
promql  = ['sum(db_client_connection_pending_requests) > 5']
logql   = ['{service="payment-service"} |= "pool_timeout"']
traceql = ['{ resource.service.name = "payment-service" && name = "create_payment" && status = error }']
---*/

-- Postgres itself is bored: nothing waits for a lock, nothing scans.

-- name: export
BEGIN READ ONLY;
DECLARE export NO SCROLL CURSOR FOR
    SELECT id, reference, amount, status, created_at
      FROM payments
     WHERE merchant_id = :merchant_id
     ORDER BY created_at DESC;
FETCH 500 FROM export;
-- think: 3s..9s
FETCH 500 FROM export;
-- think: 3s..9s
CLOSE export;
COMMIT;

-- name: evidence
-- Eight in ten of the API's connections sit in a transaction and have waited for their client for half a second or more.
SELECT count(*) FILTER (WHERE held) >= 0.8 * count(*) AND count(*) > 0 AS visible,
       count(*) FILTER (WHERE held) AS held_by_clients,
       count(*) AS connections
  FROM (SELECT state = 'idle in transaction' AND state_change < clock_timestamp() - interval '500 milliseconds' AS held
          FROM pg_stat_activity
         WHERE application_name = 'payments-api') AS api;
