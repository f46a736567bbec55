/*---
title    = "The evidence never shows"
category = "tests"
severity = "low"
cause    = "A test."
fix      = "None."
witness_within = "2s"
---*/

-- name: evidence
SELECT false AS visible;
