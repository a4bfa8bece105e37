#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Runs the tests: each module in a process of its own, some at a time.

usage: tests/run.py [-j N] [-t SECONDS] [-s N] [-p PATTERN] [-v]
                    [--also PYTHON PATTERN] ... [MODULE ...]

Two more than there are processors run at once, as some of the time is
waiting.  --also runs the modules that match PATTERN on another interpreter,
too, or with PATTERN/N one in N of the tests of each, by lot; all is one queue,
so that no processor idles in between.  A module's
output is kept together and shown when it fails (always with -v).  One that
takes more than SECONDS is killed, by the number of the process that was
started for it.

Where memory has room, and TMPDIR does not say another place, temporary files
are there: that saves a quarter of the processor time, and the waiting for a
disk.  Those of DISK stay on a disk, on the interpreter that runs all tests.

At the end: the reason of each skip, the slowest tests, and one line `N passed,
N failed, N skipped`.  Exit status 1 if a test failed, if none ran, or, where
CI is set in the environment, if one was skipped.  `python3 -m unittest
discover -s tests` runs the same tests.

Where CI is set, up to AGAIN tests that failed are run once more, alone, and
those that pass then are named as unsteady: what they printed stays in sight,
and no change is held up by a machine that was too busy for a moment.

If TALLY is set in the environment, the three numbers are appended to the file
it names.
"""

import argparse
import collections
import concurrent.futures
import fnmatch
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import unittest

TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TESTS)
RUNNING = set()                 # processes of modules, each a group
AGAIN = 3                       # more failures than that are no accident
MEMORY = '/dev/shm'             # a file system in memory, on Linux
ROOM = 4 << 30                  # bytes that have to be free there
# Those that take long come first, or the last one would run alone.
FIRST = ['test_' + name for name in (
    's3_server', 'e2e_interrupt', 'e2e_hosts', 'e2e_wrappers',
    'server_hostile', 'e2e_badinput', 'bench', 'e2e_ssh', 'silent_loss',
    'keygen', 'e2e_embedded', 'recrypt', 'cli_startup', 'cache_files', 'dedup',
    'e2e_network', 'payments', 's3_store', 'web_security', 'hostile_server',
    'alarms', 'books', 'keytools', 'cli_delete')]
# Tests of what a file system holds: their files are where users have theirs.
DISK = ('test_e2e_', 'test_extract_', 'test_full_disk', 'test_rows')


class Job(collections.namedtuple('Job', 'python version name every')):
    """A module, or a test of one, on an interpreter of some version; one in
    `every` of its tests.
    """

    def __str__(self):
        ours = self.python == sys.executable
        return self.name if ours else self.name + ' ' + self.version


class Result(unittest.TextTestResult):
    """Remembers seconds, skips and failures by test name."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seconds = {}       # test -> seconds
        self.begun = 0.0        # of the running test
        self.passed = 0
        self.bad = set()        # tests that failed, however often

    def startTest(self, test):
        self.begun = time.monotonic()
        super().startTest(test)

    def stopTest(self, test):
        self.seconds[test.id()] = time.monotonic() - self.begun
        super().stopTest(test)

    def addSuccess(self, test):
        self.passed += 1
        super().addSuccess(test)

    def addExpectedFailure(self, test, err):
        self.passed += 1
        super().addExpectedFailure(test, err)

    def addFailure(self, test, err):
        self.bad.add(test.id())
        super().addFailure(test, err)

    def addError(self, test, err):
        self.bad.add(test.id())
        super().addError(test, err)

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self.bad.add(test.id())
        super().addSubTest(test, subtest, err)

    def addUnexpectedSuccess(self, test):
        self.bad.add(test.id())
        super().addUnexpectedSuccess(test)


def flat(suite):
    """The tests in a suite of suites."""
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from flat(test)
        else:
            yield test


def child(name, report, every):
    """Run a module or a test of one, or one in `every` of its tests, by lot;
    its figures go to file `report`.
    """
    sys.path[:0] = [TESTS, ROOT]
    suite = unittest.defaultTestLoader.loadTestsFromName(name)
    if every > 1:
        tests = list(flat(suite))
        some = set(random.sample(range(len(tests)), -(-len(tests) // every)))
        suite = unittest.TestSuite(
            test for number, test in enumerate(tests) if number in some)
    result = unittest.TextTestRunner(
        stream=sys.stdout, verbosity=2, resultclass=Result).run(suite)
    with open(report, 'w') as file:
        json.dump({
            'passed': result.passed,
            'failed': sorted(result.bad),
            'skipped': [(test.id(), why) for test, why in result.skipped],
            'seconds': result.seconds,
            'cpu': sum(os.times()[:4]),     # with all that it waited for
        }, file)


def in_memory():
    """Whether MEMORY is as good a place for files as a disk is."""
    try:
        with tempfile.NamedTemporaryFile(dir=MEMORY) as file:
            os.setxattr(file.name, 'user.test', b'')
        place = os.statvfs(MEMORY)
    except (OSError, AttributeError):
        return False
    return place.f_bavail * place.f_frsize >= ROOM and \
        not place.f_flag & os.ST_NOEXEC


def environment(job):
    """The environment of its process."""
    names = dict(os.environ)
    # The programs are compiled once, not by each of thousands of processes.
    names.pop('PYTHONDONTWRITEBYTECODE', None)
    on_disk = job.python == sys.executable and job.name.startswith(DISK)
    if not on_disk and in_memory():
        names.setdefault('TMPDIR', MEMORY)
    return names


def run(job, limit):
    """Run it in a child; (figures, its output, seconds it took)."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix='tests-') as temp:
        report = os.path.join(temp, 'report')
        with open(os.path.join(temp, 'output'), 'w+b') as output:
            process = subprocess.Popen(
                [job.python, os.path.abspath(__file__), '--child', report,
                 job.name, str(job.every)], cwd=ROOT, env=environment(job),
                stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True)
            note = ''
            RUNNING.add(process.pid)
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                note = 'killed after %d seconds\n' % limit
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            RUNNING.discard(process.pid)
            output.seek(0)
            text = output.read().decode('utf-8', 'replace') + note
        try:
            with open(report) as file:
                figures = json.load(file)
        except (OSError, ValueError):
            figures = {'passed': 0, 'failed': [job.name], 'skipped': [],
                       'seconds': {}, 'cpu': 0.0}
            text += 'the module did not run to its end (exit status %d)\n' \
                % process.returncode
    return figures, text, time.monotonic() - begun


def stop(number, frame):
    """A signal to end: the modules end too."""
    for pid in list(RUNNING):
        os.killpg(pid, signal.SIGKILL)
    os._exit(128 + number)


def modules(pattern):
    """Names of the test modules that match."""
    return [name[:-len('.py')] for name in sorted(os.listdir(TESTS))
            if fnmatch.fnmatch(name, pattern)]


def others(pairs):
    """The Jobs of --also."""
    for python, pattern in pairs:
        version = subprocess.check_output(
            [python, '-c', 'import sys; print(sys.version.split()[0])'],
            universal_newlines=True).strip()
        pattern, _, every = pattern.partition('/')
        for name in modules(pattern):
            yield Job(python, version, name, int(every or 1))


def long_first(job):
    """Key to sort by: the order of FIRST, then the largest file."""
    path = os.path.join(TESTS, job.name.partition('.')[0] + '.py')
    return (FIRST.index(job.name) if job.name in FIRST else len(FIRST),
            -os.path.getsize(path) if os.path.exists(path) else 0)


def run_all(jobs, most, limit, verbose):
    """Run them, `most` at once, printing as they end; the sum of their
    figures, with a Job for each test.
    """
    total = {'passed': 0, 'failed': [], 'skipped': [], 'seconds': [],
             'cpu': 0.0}
    with concurrent.futures.ThreadPoolExecutor(most) as pool:
        running = {pool.submit(run, job, limit): job for job in jobs}
        for future in concurrent.futures.as_completed(running):
            job, (figures, text, seconds) = running[future], future.result()
            print('%-26s %6.1f s %6.1f cpu  %3d passed, %d failed, '
                  '%d skipped' % (
                      job, seconds, figures['cpu'],
                      figures['passed'], len(figures['failed']),
                      len(figures['skipped'])))
            if verbose or figures['failed']:
                print(text, end='' if text.endswith('\n') else '\n')
            sys.stdout.flush()
            total['passed'] += figures['passed']
            total['cpu'] += figures['cpu']
            total['failed'] += [job._replace(name=test, every=1)
                                for test in figures['failed']]
            total['skipped'] += [(job._replace(name=test), why)
                                 for test, why in figures['skipped']]
            total['seconds'] += [(seconds, job._replace(name=test)) for
                                 test, seconds in figures['seconds'].items()]
    return total


def run_again(total, limit):
    """Run what failed once more, alone; what passes then is unsteady."""
    for job in list(total['failed']):
        figures, text, _ = run(job, limit)
        if figures['passed'] and not figures['failed']:
            print('unsteady: %s failed once, and passed alone' % str(job))
            total['failed'].remove(job)
            total['passed'] += figures['passed']
        else:
            print('failed again: %s' % str(job))
            print(text, end='' if text.endswith('\n') else '\n')


def main():
    if sys.argv[1:2] == ['--child']:
        child(sys.argv[3], sys.argv[2], int((sys.argv[4:] or [1])[0]))
        return 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    parser = argparse.ArgumentParser(description='Runs the tests.')
    most = (os.cpu_count() or 1) + 2
    parser.add_argument('-j', type=int, default=most, metavar='N',
                        help='modules at once (default here %d)' % most)
    parser.add_argument('-t', type=float, default=600, metavar='SECONDS',
                        help='most for one module (default 600)')
    parser.add_argument('-s', type=int, default=8, metavar='N',
                        help='show the N slowest tests (default 8)')
    parser.add_argument('-p', default='test*.py', metavar='PATTERN',
                        help='modules to run (default test*.py)')
    parser.add_argument('-v', action='store_true',
                        help='show the output of all modules')
    parser.add_argument('--also', nargs=2, action='append', default=[],
                        metavar=('PYTHON', 'PATTERN'),
                        help='run these modules on that interpreter, too')
    parser.add_argument('modules', nargs='*', metavar='MODULE')
    args = parser.parse_args()
    names = [os.path.basename(name)[:-3] if name.endswith('.py') else name
             for name in args.modules] or modules(args.p)
    version = sys.version.split()[0]
    jobs = [Job(sys.executable, version, name, 1) for name in names]
    jobs = sorted(jobs + list(others(args.also)), key=long_first)
    begun = time.monotonic()
    total = run_all(jobs, args.j, args.t, args.v)
    if os.environ.get('CI') and len(total['failed']) <= AGAIN:
        run_again(total, args.t)
    for test, why in total['skipped']:
        print('skipped: %s: %s' % (test, why))
    for seconds, test in sorted(total['seconds'], reverse=True)[:args.s]:
        print('slow: %6.1f s  %s' % (seconds, test))
    print('Python %s, %d modules, %.0f seconds, %.0f of CPU' % (
        ', '.join(sorted({job.version for job in jobs})), len(jobs),
        time.monotonic() - begun, total['cpu']))
    numbers = (total['passed'], len(total['failed']), len(total['skipped']))
    if os.environ.get('TALLY'):
        with open(os.environ['TALLY'], 'a') as file:
            file.write('%d %d %d\n' % numbers)
    if os.environ.get('CI') and numbers[2]:
        print('a skipped test is a failure where CI is set')
    if not sum(numbers):
        print('no test ran')
    print('%d passed, %d failed, %d skipped' % numbers)
    failed = numbers[1] or not numbers[0] or (os.environ.get('CI')
                                              and numbers[2])
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
