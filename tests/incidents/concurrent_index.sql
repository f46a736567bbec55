/*---
title    = "A migration that cannot run in a transaction drops an index"
category = "indexes"
severity = "low"
cause    = "For tests: a change whose journal row must come first, since nothing of it can be rolled back."
fix      = "Build it again."

[actor.settlement]
sessions = 3
---*/

-- name: inject
-- transaction: none
SELECT pg_get_indexdef('payments_merchant_id_created_at_idx'::regclass) AS definition;
DROP INDEX CONCURRENTLY payments_merchant_id_created_at_idx;
ALTER TABLE outbox SET (autovacuum_enabled = false);
CREATE INDEX CONCURRENTLY payments_amount_idx ON payments (amount);

-- name: recover
-- transaction: none
ALTER TABLE outbox RESET (autovacuum_enabled);
DROP INDEX CONCURRENTLY IF EXISTS payments_amount_idx;
DO $$
BEGIN
    -- A build that was cut short leaves an invalid index of this name.
    IF EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass('payments_merchant_id_created_at_idx') AND NOT indisvalid) THEN
        DROP INDEX payments_merchant_id_created_at_idx;
    END IF;
END
$$;
CREATE INDEX CONCURRENTLY IF NOT EXISTS payments_merchant_id_created_at_idx ON payments (merchant_id, created_at);

-- name: settlement
BEGIN;
SELECT sum(balance) AS payout
  FROM (SELECT balance FROM accounts WHERE merchant_id = :hot_merchant_id ORDER BY id FOR UPDATE) AS locked;
-- think: 200ms
COMMIT;

-- name: evidence
SELECT to_regclass('payments_merchant_id_created_at_idx') IS NULL AND :definition::text IS NOT NULL AS visible;
