"""The calls register themselves when they are imported, once: only the tests are collected."""

collect_ignore_glob = ["[!t]*.py"]
