"""Loads what most Python services load, does a little work and says so."""
import json
import platform
import sqlite3
import ssl

db = sqlite3.connect(":memory:")
db.execute("create table squares (n integer, square integer)")
db.executemany("insert into squares values (?, ?)", ((n, n * n) for n in range(1000)))
total, = db.execute("select sum(square) from squares").fetchone()

print(json.dumps({
    "python": platform.python_version(),
    "openssl": ssl.OPENSSL_VERSION.split()[1],
    "sqlite": sqlite3.sqlite_version,
    "sum": total,
}))
print("ok", flush=True)
