/*---
title    = "A migration dropped the index that finds payments by their reference"
category = "indexes"
severity = "high"
cause    = "A clean-up migration dropped payments_reference_idx as unused, so every look-up by reference reads the whole payments table."
fix      = "CREATE INDEX CONCURRENTLY payments_reference_idx ON payments (reference);"
traps    = ["adding CPU or replicas", "raising work_mem or shared_buffers", "ANALYZE or VACUUM of payments", "caching look-ups in the API"]
witness_within = "5s"

[signals]
promql  = ['sum(rate(pg_stat_user_tables_seq_tup_read{relname="payments"}[1m])) > 100000']
logql   = ['{app="postgres"} |= "duration:" |= "FROM payments WHERE reference"']
traceql = ['{ resource.service.name = "payment-service" && span.db.query.text =~ ".*FROM payments WHERE reference.*" && duration > 30ms }']
---*/

-- Only look-ups and repeated payments need the index: most payments stay fast, which is what makes it a puzzle.

-- name: inject
SELECT seq_scan AS scans_before FROM pg_stat_user_tables WHERE relid = 'payments'::regclass;
DROP INDEX payments_reference_idx;

-- name: recover
CREATE INDEX IF NOT EXISTS payments_reference_idx ON payments (reference);

-- name: evidence
-- Nothing indexes the reference any more, and sequential scans of payments have come since.
SELECT seq_scan - :scans_before::bigint >= 5
       AND NOT EXISTS (SELECT FROM pg_index AS index
                         JOIN pg_attribute AS attribute ON attribute.attrelid = index.indrelid AND attribute.attnum = index.indkey[0]
                        WHERE index.indrelid = payments.relid AND index.indisvalid AND attribute.attname = 'reference') AS visible,
       seq_scan - :scans_before::bigint AS sequential_scans,
       seq_tup_read AS rows_read_in_total
  FROM pg_stat_user_tables AS payments
 WHERE relid = 'payments'::regclass;
