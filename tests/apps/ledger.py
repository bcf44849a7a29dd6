# SPDX-License-Identifier: MIT OR Apache-2.0
"""A ledger in a SQLite database and a log: what memory knows, both must say, however often it is dumped and restored.

Usage: ledger.py JOURNAL_MODE, in a directory of its own. Files there steer it: `hold` leaves it in the middle of a
transaction, `check` makes it compare everything and write `verdict`.
"""
import os
import sqlite3
import sys
import time

database = sqlite3.connect("data.db", isolation_level=None)
database.execute("PRAGMA journal_mode=" + sys.argv[1])
# Pages of a large transaction go to the file before it is committed.
database.execute("PRAGMA cache_size=4")
database.execute("CREATE TABLE entry (n INTEGER, amount INTEGER, padding TEXT)")
log = open("log.txt", "a", buffering=1)
count = 0
total = 0


def publish(name, text):
    with open(name + ".new", "w") as out:
        out.write(text)
    try:
        os.rename(name + ".new", name)
    except FileNotFoundError:
        # Dumped just before the rename, which was done then: a file that nobody has open isn't rolled back.
        pass


def verdict():
    problems = [row[0] for row in database.execute("PRAGMA integrity_check") if row[0] != "ok"]
    rows, amount = database.execute("SELECT count(*), coalesce(sum(amount), 0) FROM entry").fetchone()
    if (rows, amount) != (count, total):
        problems.append("database has %d rows of %d, memory %d of %d" % (rows, amount, count, total))
    lines = open("log.txt").read().splitlines()
    if lines != ["entry %d" % n for n in range(1, count + 1)]:
        problems.append("log has %d lines for %d entries" % (len(lines), count))
    # It can be written to, too.
    database.execute("INSERT INTO entry VALUES (?, 0, '')", (count + 1,))
    return "; ".join(problems) or "ok %d" % count


while True:
    if os.path.exists("check"):
        text = verdict()
        publish("verdict", text)
        sys.exit(0 if text.startswith("ok") else 1)
    if os.path.exists("hold"):
        database.execute("BEGIN")
        database.execute("UPDATE entry SET amount = amount + 1000, padding = padding || 'x'")
        log.write("half an en")
        log.flush()
        open("held", "w").close()
        while os.path.exists("hold"):
            time.sleep(0.01)
        os._exit(9)
    count += 1
    total += count
    database.execute("INSERT INTO entry VALUES (?, ?, ?)", (count, count, "p" * 500))
    log.write("entry %d\n" % count)
    publish("progress", "%d\n" % count)
    time.sleep(0.005)
