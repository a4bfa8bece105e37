#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""What a page of an account costs, as CGI under Apache.

usage: bench/web.py [--requests N] [--clients N,N] [--days N,N]

For an account of one month and one of ten years, and for 1 and 20 clients at
the same time: the median of the processor time of a script, from its start to
its end, the median and the slowest time until a client had its page, and pages
a second.
The first line of an account is the one page that reads the whole ledger, as
after its view was lost.
"""

import argparse
import os
import statistics
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(HERE, '..', 'tests'), os.path.join(HERE, '..')]

import webpeer          # noqa: E402

# None is a program that reads two months as CSV, with a password each time.
PAGES = (None, '', 'manage.cgi', 'activity.cgi',
         'activity.cgi?view=machines', 'machine.cgi?mid=%s', 'payments.cgi',
         'settings.cgi')
# What each script runs at its end: its processor time, from its start on.
HOOK = '''import atexit, os, time
def said():
    fd = os.open(%r, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, b'%%f\\n' %% time.process_time())
atexit.register(said)
'''


class Meter:
    """Seconds of processor time of the scripts that a Site has run."""

    def __init__(self, site):
        self.path = site.file('run/times')
        hook = site.file('hook')
        os.mkdir(hook, 0o755)
        with open(os.path.join(hook, 'sitecustomize.py'), 'w') as file:
            file.write(HOOK % self.path)
        site.stop()
        site.start('-c', 'SetEnv PYTHONPATH ' + hook)

    def take(self):
        """Of each script since the last time."""
        time.sleep(0.1)                 # the last one is at its end
        with open(self.path) as file:
            found = [float(line) for line in file]
        os.truncate(self.path, 0)
        return found


def ask(site, cookies, path, count, out):
    """One client: so many pages, one after another."""
    browser = webpeer.Browser(site)
    browser.cookies = dict(cookies)
    for _ in range(count):
        start = time.perf_counter()
        if path is None:
            page = browser.post('manage.cgi', {
                'address': 'ann@example.org', 'password': 'correct horse',
                'action': 'verboseactivity', 'format': 'csv'})
        else:
            page = browser.get(path)
        out.append(time.perf_counter() - start)
        assert page.status == 200, (path, page.status, page.text)


def measure(site, meter, cookies, path, clients, requests):
    """(processor seconds of each page, seconds until it came, pages a
    second).
    """
    out = []
    threads = [threading.Thread(target=ask, args=(
        site, cookies, path, max(1, requests // clients), out))
        for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - start
    return meter.take(), out, len(out) / wall


def account(days, options):
    """Measure an account of so many days."""
    import contextlib
    with contextlib.ExitStack() as stack:
        site = webpeer.Site(stack.callback)
        ident = site.account(cost=webpeer.tarsnapd.SCRYPT)
        numbers = webpeer.sample(site, ident, days)
        for month in range(days // 30):
            webpeer.pay(site, ident, '%d' % month, 5)
        browser = webpeer.Browser(site)
        meter, start = Meter(site), time.perf_counter()
        page = browser.login()
        assert page.status == 200, page.text + site.log()
        wall = time.perf_counter() - start
        print('%d days, %d payments; log in and read it all: %.1f s, '
              '%.1f s of processor' % (
                  days, days // 30, wall,
                  sum(meter.take())), flush=True)
        for path in PAGES:
            # An address may not try more than ten passwords at once.
            for clients in options.clients if path is not None else [1]:
                used, out, rate = measure(
                    site, meter, browser.cookies,
                    path and path.replace('%s', numbers[0]), clients,
                    options.requests)
                print('  %-28s %2d clients  %5.1f ms of processor  '
                      '%6.1f ms median  %6.1f ms slowest  %5.1f pages/s' % (
                          'CSV for a program' if path is None
                          else '/' + path.partition('=%')[0], clients,
                          statistics.median(used) * 1000,
                          statistics.median(out) * 1000, max(out) * 1000,
                          rate), flush=True)


def numbers(text):
    return [int(word) for word in text.split(',')]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--requests', type=int, default=100)
    parser.add_argument('--clients', type=numbers, default=[1, 20])
    parser.add_argument('--days', type=numbers, default=[30, 3652])
    options = parser.parse_args()
    for days in options.days:
        account(days, options)


if __name__ == '__main__':
    main()
