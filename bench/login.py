#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Does time tell which users a server knows?

usage: bench/login.py [--rounds N]

Asks a real server, in random order and over one kind of connection, for the
CHALLENGE of a user there is and of one there is not, and prints the medians
and how often the one took longer than the other: 50 % is as good as a coin.
A difference of three standard errors or more says so, with exit status 1.
"""

import argparse
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(HERE, '..', 'tests'), os.path.join(HERE, '..')]

import rawclient        # noqa: E402
import tarsnapd         # noqa: E402

USERS = ('joe@example.org', 'eve@example.org')      # the first one is known


def ask(client, user):
    """Seconds for one CHALLENGE."""
    body = bytes(32) + bytes([len(user)]) + user.encode()
    start = time.perf_counter()
    client.call('REGISTER1', body)
    return time.perf_counter() - start


def measure(serve, rounds):
    """Pairs of seconds: known, unknown."""
    pairs, connect = [], socket.create_connection
    while len(pairs) < rounds:
        # An address may not ask for so many.
        source = '127.1.%d.%d' % divmod(len(pairs) // 8, 256), 0
        with mock.patch.object(socket, 'create_connection',
                               lambda *args: connect(*args, source)):
            client = serve.client()
        for _ in range(8):
            order = random.sample(USERS, 2)
            seconds = {user: ask(client, user) for user in order}
            pairs.append([seconds[user] for user in USERS])
        client.close()
    return pairs


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rounds', type=int, default=2000)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as base:
        path = os.path.join(base, 'srv')
        tarsnapd.server_create(path)
        tarsnapd.certificate_renew(path)
        server = tarsnapd.Server(path)
        server.run(tarsnapd.account_create(USERS[0], b'pw'))
        server.close()
        serve = rawclient.Serve(path)
        try:
            pairs = measure(serve, rounds)
        finally:
            serve.kill()
    known, unknown = zip(*pairs)
    longer = sum(a > b for a, b in pairs) / len(pairs)
    error = 0.5 / len(pairs) ** 0.5
    print('known    %7.1f us' % (statistics.median(known) * 1e6))
    print('unknown  %7.1f us' % (statistics.median(unknown) * 1e6))
    print('known took longer in %.1f %% of %d pairs; chance is 50 +- %.1f'
          % (100 * longer, len(pairs), 100 * error))
    return abs(longer - 0.5) > 3 * error


if __name__ == '__main__':
    sys.exit(main())
