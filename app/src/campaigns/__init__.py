"""E-mail campaigns as Celery tasks. The ledger in Redis is the truth, a message in a queue only a hint."""
