/*---
[actor.payment]
share            = 1.0            # the open loop itself: one run for every payment that `rate` asks for
role             = "payments_app"
application_name = "payments-api"

[actor.lookup]
share            = 0.05           # merchants' back offices ask for a payment by its reference

[actor.outbox]
sessions         = 1
role             = "outbox_publisher"
application_name = "outbox-publisher"

[actor.settlement]
sessions         = 1
role             = "settlement_app"
application_name = "settlement-worker"

[actor.report]
sessions         = 1
role             = "bi_reader"
application_name = "metabase"

[params]
repeat_share = 0.1                # the part of the payments that are a client's second try
---*/

-- The healthy day. An incident is a difference against this file.

-- name: payment
-- Take a payment. A client that got no answer sends its request again: then the API looks whether the first try arrived
-- (here it never did).
BEGIN;
SELECT currency, CASE WHEN random() < :repeat_share::float8 THEN :reference::text END AS repeat_of
  FROM accounts
 WHERE id = :account_id;
SELECT id AS first_try FROM payments WHERE reference = :repeat_of;
INSERT INTO payments (account_id, merchant_id, amount, status, reference)
VALUES (:account_id, :merchant_id, :amount, 'captured', :reference)
RETURNING id AS payment_id;
UPDATE accounts SET balance = balance + :amount WHERE id = :account_id;
INSERT INTO outbox (payment_id, event) VALUES (:payment_id, 'payment.captured');
COMMIT;

-- name: lookup
-- Show one payment, found by the reference that the client knows.
SELECT reference AS wanted FROM payments WHERE id = (SELECT (random() * max(id))::bigint FROM payments);
SELECT id, status, amount, created_at FROM payments WHERE reference = :wanted;

-- name: outbox
-- Publish what happened, oldest first; two publishers would share the work.
BEGIN;
SELECT array_agg(id) AS batch
  FROM (SELECT id FROM outbox WHERE sent_at IS NULL ORDER BY id LIMIT 200 FOR UPDATE SKIP LOCKED) AS unsent;
DELETE FROM outbox WHERE id = ANY (:batch::bigint[]);
COMMIT;
-- think: 300ms..700ms

-- name: settlement
-- Pay out what one merchant's account holds. Nothing is locked while the acquirer is called.
-- think: 5s..10s
BEGIN;
SELECT id AS payout_account, balance AS payout
  FROM accounts
 WHERE merchant_id = :merchant_id AND balance > 0
 ORDER BY balance DESC
 LIMIT 1
   FOR NO KEY UPDATE SKIP LOCKED;
UPDATE accounts SET balance = balance - :payout WHERE id = :payout_account;
INSERT INTO settlements (merchant_id, amount)
SELECT :merchant_id::integer, :payout::numeric WHERE :payout::numeric IS NOT NULL;
COMMIT;

-- name: report
-- How much each country took in the last five minutes.
SELECT merchant.country, count(*) AS payments, sum(payment.amount) AS amount
  FROM merchants AS merchant
  JOIN payments AS payment ON payment.merchant_id = merchant.id
 WHERE payment.merchant_id <= 20
   AND payment.created_at > now() - interval '5 minutes'
 GROUP BY merchant.country;
-- think: 20s..40s
