# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""No mail is lost, whatever fails, whoever is killed, however many at once.

Also the command line: `run`, `learn` and what is printed.
"""

import contextlib
import gc
import io
import json
import mailbox
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from unittest import mock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import cronwatch                                            # noqa: E402
import world                                                # noqa: E402

PROGRAM = world.Programs.path('cronwatch')

DAY = 86400
MAIL = ('From: root@h\nSubject: Cron <root@h> backup\nDate: %s\n\n'
        'started\n%d files\nfinished\n')


def mail(number, more='', at=None):
    date = time.strftime('%a, %d %b %Y %H:%M:%S +0000',
                         time.gmtime(1700000000 + number * DAY
                                     if at is None else at))
    return (MAIL % (date, 1000 + number % 7) + more).encode()


class Case(unittest.TestCase):

    def setUp(self):
        base = tempfile.TemporaryDirectory()
        self.addCleanup(base.cleanup)
        self.base = base.name
        self.dir = os.path.join(self.base, 'state')

    def path(self, *names):
        return os.path.join(self.base, *names)

    def run_it(self, *words, data=b'', **kwargs):
        return subprocess.run(
            [sys.executable, PROGRAM, '--dir', self.dir, *words], input=data,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)

    def passed(self):
        """The mails that were passed on."""
        folder = os.path.join(self.dir, 'passed', 'new')
        found = []
        for name in sorted(os.listdir(folder)
                           if os.path.isdir(folder) else ()):
            with open(os.path.join(folder, name), 'rb') as file:
                found.append(file.read())
            os.unlink(os.path.join(folder, name))
        return found

    def known(self):
        """Runs of all jobs."""
        state = cronwatch.State(os.path.join(self.dir, 'state.db'))
        runs = state.db.execute('SELECT sum(runs) FROM job').fetchone()[0]
        self.assertEqual(state.db.execute(
            'PRAGMA integrity_check').fetchone()[0], 'ok')
        state.close()
        return runs or 0

    def conf(self, text):
        os.makedirs(self.dir, exist_ok=True)
        with open(os.path.join(self.dir, 'cronwatch.conf'), 'w') as file:
            file.write(text)


class Failures(Case):
    """Each gives the mail back as it came, and never a bounce."""

    def deliver(self, raw=None, **kwargs):
        with mock.patch.object(cronwatch, 'say') as said:
            status, _ = cronwatch.deliver(
                self.dir, io.BytesIO(mail(1) if raw is None else raw),
                **kwargs)
        # A process ends here, and with it what it had open: a lock too.
        gc.collect()
        return status, said.called

    def test_each_statement_of_the_database(self):
        real, count, kept = sqlite3.connect, [0, 0], 0

        class Connection(sqlite3.Connection):
            def execute(self, *args):
                count[0] += 1
                if count[0] == count[1]:
                    raise sqlite3.OperationalError('disk I/O error')
                return super().execute(*args)

        self.assertEqual(self.deliver(), (0, False))
        with mock.patch.object(sqlite3, 'connect', lambda *args, **kwargs:
                               real(*args, factory=Connection, **kwargs)):
            for n in range(1, 100):
                count[1] = 0
                before = self.known()
                count[:] = 0, n
                status, said = self.deliver(mail(n))
                self.assertEqual(status, 0)
                if count[0] < n:        # it was over before
                    break
                count[1] = 0
                found = self.passed()
                self.assertTrue(said)
                # Either it was passed on or it was judged and kept.
                self.assertEqual((found, self.known()), (
                    ([mail(n)], before) if found else ([], before + 1)), n)
                kept += not found
        self.assertGreater(n, 10)
        self.assertLess(kept, 8)

    def test_each_function(self):
        for name in ('mail_parse', 'mail_run', 'Observed', 'Judge',
                     'run_learn', 'next_due', 'State', 'conf_read',
                     'raise_alarm', 'alarms_send', 'packed'):
            for error in (ValueError, MemoryError, RecursionError, OSError,
                          sqlite3.DatabaseError):
                with mock.patch.object(cronwatch, name, side_effect=error):
                    raw = b'Subject: %s %s\n\nit failed: error\n' % (
                        name.encode(), error.__name__.encode())
                    self.assertEqual(self.deliver(raw), (0, True), name)
                    self.assertEqual(self.passed(), [raw])

    def test_a_state_that_is_none(self):
        os.mkdir(self.dir)
        with open(os.path.join(self.dir, 'state.db'), 'wb') as file:
            file.write(b'no database' * 1000)
        self.assertEqual(self.deliver(), (0, True))
        self.assertEqual(self.passed(), [mail(1)])

    def test_a_wrong_configuration(self):
        self.conf('forwrad x\n')
        self.assertEqual(self.deliver(), (0, True))
        self.assertEqual(self.passed(), [mail(1)])

    def test_it_takes_too_long(self):
        with mock.patch.object(cronwatch, 'SECONDS', 1), mock.patch.object(
                cronwatch, 'mail_run', lambda *_: time.sleep(60)):
            self.assertEqual(self.deliver(), (0, True))
        self.assertEqual(self.passed(), [mail(1)])

    def test_nothing_can_be_written(self):
        with open(self.dir, 'w'):
            pass
        self.assertEqual(self.deliver(), (75, True))

    def test_a_filter_gives_it_back(self):
        out = io.BytesIO()
        with mock.patch.object(cronwatch, 'State', side_effect=OSError):
            self.assertEqual(self.deliver(out=out), (0, True))
        self.assertEqual((out.getvalue(), self.passed()), (mail(1), []))

    def test_places_to_pass_it_on(self):
        raw = b'From me\nSubject: x\n\nFrom here\n>From there\nno end'
        for place in ('maildir/', 'mbox'):
            self.conf('forward %s\n' % self.path(place))
            with mock.patch.object(cronwatch, 'State', side_effect=OSError):
                self.deliver(raw)
                self.deliver(raw)
        box = mailbox.mbox(self.path('mbox'), create=False)
        mails = [message.as_bytes() for message in box]
        box.close()
        self.assertEqual(len(mails), 2)
        self.assertIn(b'\n>From here\n>>From there\nno end', mails[0])
        names = os.listdir(self.path('maildir', 'new'))
        self.assertEqual(len(names), 2)
        with open(self.path('maildir', 'new', names[0]), 'rb') as file:
            self.assertEqual(file.read(), raw)

    def test_our_own_mail_is_passed_on(self):
        raw = b'Subject: x\nX-Cronwatch: raise\n\nerror\n'
        self.assertEqual(self.deliver(raw), (0, False))
        self.assertEqual((self.passed(), self.known()), ([raw], 0))


class Silent:
    """A port where nobody ever ends what he says: `came` has what look() gave
    for each connection.
    """

    def __init__(self, test, look, line=b''):
        self.look, self.line, self.came = look, line, []
        self.listener = socket.create_server(('127.0.0.1', 0))
        self.port = self.listener.getsockname()[1]
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self.accept)]
        self.threads[0].start()
        test.addCleanup(self.close)

    def accept(self):
        while True:
            sock, _ = self.listener.accept()
            if self.over.is_set():
                return sock.close()
            self.came.append(self.look())
            self.threads.append(threading.Thread(target=self.talk,
                                                 args=(sock,)))
            self.threads[-1].start()

    def talk(self, sock):
        with sock, contextlib.suppress(OSError):
            while not self.over.wait(0.2):
                sock.sendall(self.line)

    def close(self):
        self.over.set()
        socket.create_connection(('127.0.0.1', self.port)).close()
        for thread in self.threads:
            thread.join()
        self.listener.close()


class Hurry(Case):
    """Whoever waits for a delivery does not wait for a mail server."""

    def setUp(self):
        super().setUp()
        for name, seconds in (('HURRY_SECONDS', 1), ('HURRY_TOTAL', 6)):
            patch = mock.patch.object(cronwatch, name, seconds)
            patch.start()
            self.addCleanup(patch.stop)

    def peers(self, line=b''):
        """A mail server and a Twilio that are silent, and two people."""
        peers = [Silent(self, lambda: os.listdir(self.path('kept', 'new')),
                        line) for _ in range(2)]
        self.conf(
            'person ann mail=ann@example.org sms=+15550101\n'
            'person bob mail=bob@example.org sms=+15550102\n'
            'mail-from a@example.org\nmail-tls no\n'
            'mail-smtp 127.0.0.1:%d\ntwilio-api http://127.0.0.1:%d\n'
            'twilio-account AC1\ntwilio-number +15550100\n'
            'pass all\nforward %s/\n' % (
                *(peer.port for peer in peers), self.path('kept')))
        secret = os.path.join(self.dir, 'secrets')
        with open(secret, 'w') as file:
            file.write('twilio-token x\n')
        os.chmod(secret, 0o600)
        self.state = cronwatch.State(os.path.join(self.dir, 'state.db'))
        self.addCleanup(self.state.close)
        return peers

    def send(self, now):
        """What is due goes out, by servers that work; how many notices."""
        sent = mock.Mock(return_value='SM1')
        conf = cronwatch.conf_read(os.path.join(
            self.dir, 'cronwatch.conf'), cronwatch.OPTIONS)
        with mock.patch.dict(cronwatch.SENDERS, mail=sent, sms=sent):
            cronwatch.alarms_send(self.state, conf, now)
        return sent.call_count

    def deliver(self, job=b'x'):
        """Seconds that a delivery took, of a mail that is raised."""
        begun = time.monotonic()
        status, findings = cronwatch.deliver(self.dir, io.BytesIO(
            b'Subject: %s\n\nit failed: error\n' % job))
        self.assertEqual((status, len(findings)), (0, 1))
        return time.monotonic() - begun

    def tries(self):
        return sorted(tries for tries, in self.state.db.execute(
            "SELECT tries FROM notice WHERE state IN ('ready', 'trying')"))

    def test_each_is_tried_once_after_the_mail_was_kept(self):
        peers = self.peers()
        now = time.time()
        with self.state.change():           # that bob is to be told of by now
            cronwatch.alarm_raise(self.state, 'warning', None, 'door',
                                  now - 601)
        self.assertEqual(self.send(now - 601), 2)
        self.assertLess(self.deliver(), 5)
        self.assertEqual([list(map(len, peer.came)) for peer in peers],
                         [[1], [1]])
        self.assertEqual(self.tries(), [0, 0, 1, 1])
        # The next one begins with those that were left.
        with self.state.change():
            self.state.db.execute('UPDATE notice SET next = ?', (now,))
        self.deliver(b'y')
        self.assertEqual([list(map(len, peer.came)) for peer in peers],
                         [[1, 2], [1, 2]])
        self.assertEqual(self.tries(), [1, 1, 1, 1])

    def test_what_was_left_is_sent_by_the_next(self):
        self.peers()
        now = time.time()
        with self.state.change():
            cronwatch.alarm_raise(self.state, 'warning', None, 'door',
                                  now - 601)
        self.send(now - 601)
        self.deliver()
        self.assertEqual(self.send(time.time()), 2)
        with mock.patch.object(cronwatch, 'twilio_find', return_value=None):
            self.assertEqual(self.send(time.time() + 120), 2)
        self.assertEqual(self.tries(), [])

    def test_an_answer_without_end(self):
        self.peers(b'220-wait\r\n')
        with mock.patch.object(cronwatch, 'HURRY_TOTAL', 2):
            self.assertLess(self.deliver(), 5)
        self.assertEqual(len(os.listdir(self.path('kept', 'new'))), 1)


class Kills(Case):

    def test_killed_at_each_statement(self):
        self.assertEqual(self.run_it('deliver', data=mail(0)).returncode, 0)
        points = 0
        while True:
            points += 1
            before = self.known()
            child = os.fork()
            if not child:
                try:
                    self.die_at(points, mail(points))
                finally:
                    os._exit(9)
            _, status = os.waitpid(child, 0)
            after = self.known()
            if not os.WIFSIGNALED(status):
                break
            self.assertIn(after - before, (0, 1))
            self.assertEqual(self.run_it('check').returncode, 0)
        self.assertEqual(os.WEXITSTATUS(status), 0)
        self.assertEqual(after, before + 1)
        self.assertGreater(points, 5)

    def die_at(self, point, raw):
        """Deliver in this process, killed at its `point`-th statement."""
        count = [0]

        def trace(_):
            count[0] += 1
            if count[0] == point:
                os.kill(os.getpid(), signal.SIGKILL)

        real = cronwatch.State.__init__

        def init(state, path):
            real(state, path)
            state.db.set_trace_callback(trace)

        cronwatch.State.__init__ = init
        status, _ = cronwatch.deliver(self.dir, io.BytesIO(raw))
        os._exit(status)

    def test_many_at_once(self):
        count = 12
        children = [subprocess.Popen(
            [sys.executable, PROGRAM, '--dir', self.dir, 'deliver'],
            stdin=subprocess.PIPE) for _ in range(count)]
        for number, child in enumerate(children):
            child.stdin.write(mail(number % 3))
            child.stdin.close()
        for child in children:
            self.assertEqual(child.wait(), 0)
        self.assertEqual((self.known(), self.passed()), (count, []))

    def test_killed_at_any_time(self):
        seed = random.randrange(1 << 32)
        print('seed', seed)
        rng = random.Random(seed)
        self.assertEqual(self.run_it('deliver', data=mail(0)).returncode, 0)
        for number in range(1, 13):
            before = self.known()
            child = subprocess.Popen(
                [sys.executable, PROGRAM, '--dir', self.dir, 'deliver'],
                stdin=subprocess.PIPE)
            child.stdin.write(mail(number))
            child.stdin.close()
            time.sleep(rng.uniform(0, 0.15))
            child.kill()
            child.wait()
            self.assertIn(self.known() - before, (0, 1))


class Large(Case):

    def test_a_mail_of_50_MB(self):
        raw = mail(1) + b'object 12345 is as it should be\n' * 1600000
        with open(self.path('mail'), 'wb') as file:
            file.write(raw)
        with open(self.path('mail'), 'rb') as file, open(
                self.path('out'), 'wb') as out:
            done = subprocess.run(
                ['sh', '-c', 'ulimit -v 200000; exec "$@"', '-',
                 sys.executable, PROGRAM, '--dir', self.dir, 'deliver',
                 '--filter'], stdin=file, stdout=out, stderr=subprocess.PIPE)
        self.assertEqual((done.returncode, done.stderr), (0, b''))
        with open(self.path('out'), 'rb') as file:
            self.assertEqual(file.readline(), b'X-Cronwatch: quiet\n')
            self.assertTrue(file.read() == raw)
        self.assertEqual(self.known(), 1)
        state = cronwatch.State(os.path.join(self.dir, 'state.db'))
        memory, _ = state.memory(state.job('cron root h backup'))
        self.assertEqual(memory.values['lines'][1], [1600003.0])
        state.close()


class Commands(Case):

    def test_run_keeps_output_and_status(self):
        for _ in range(3):
            done = self.run_it('run', '--', 'echo', 'well')
            self.assertEqual((done.returncode, done.stdout, done.stderr),
                             (0, b'', b''))
        done = self.run_it('run', '-v', '--', 'cat', data=b'in\n')
        self.assertEqual(done.stdout, b'in\n')
        done = self.run_it('run', '--', 'sh', '-c', 'echo out; exit 7')
        self.assertEqual(done.returncode, 7)
        self.assertIn(b'exit status 7', done.stdout)
        self.assertIn(b'out', done.stdout)
        self.assertEqual(self.run_it('run', '--', self.path('none'))
                         .returncode, 127)
        self.assertEqual(self.run_it('run', '--', self.base).returncode, 126)

    def test_run_without_a_state(self):
        with open(self.dir, 'w'):
            pass
        done = self.run_it('run', '--', 'sh', '-c', 'echo out; exit 7')
        self.assertEqual((done.returncode, done.stdout), (7, b'out\n'))
        self.assertIn(b'cronwatch:', done.stderr)

    def test_run_passes_signals(self):
        child = subprocess.Popen(
            [sys.executable, PROGRAM, '--dir', self.dir, 'run', '-v', '--',
             'sh', '-c', 'trap "echo got; exit 5" USR1; echo ready;'
             ' while :; do sleep 0.05; done'], stdout=subprocess.PIPE)
        self.assertEqual(child.stdout.readline(), b'ready\n')
        child.send_signal(signal.SIGUSR1)
        self.assertEqual(child.stdout.readline(), b'got\n')
        child.stdout.close()
        self.assertEqual(child.wait(), 5)

    def test_run_dies_of_its_command_s_signal(self):
        done = self.run_it('run', '--', 'sh', '-c', 'kill -TERM $$')
        self.assertEqual(done.returncode, -signal.SIGTERM)

    def test_run_does_not_wait_for_a_daemon(self):
        done = self.run_it('run', '--', 'sh', '-c', 'sleep 60 & echo $!',
                           '--', timeout=50)
        self.assertEqual(done.returncode, 0)
        state = cronwatch.State(os.path.join(self.dir, 'state.db'))
        row = state.db.execute('SELECT lines FROM mail').fetchone()
        os.kill(int(json.loads(cronwatch.unpacked(row[0]))[0][1]),
                signal.SIGKILL)
        state.close()

    def test_learn_and_tell(self):
        box = mailbox.mbox(self.path('box'))
        for number in range(20):
            box.add(mail(number))
        box.close()
        folder = mailbox.Maildir(self.path('folder'))
        for number in range(20, 30):
            folder.add(mail(number))
        done = self.run_it('learn', self.path('box'), self.path('folder'))
        self.assertEqual(done.stdout, b'30 mails learned, of 30\n')
        done = self.run_it('learn', self.path('box'))
        self.assertEqual(done.stdout, b'0 mails learned, of 20\n')
        with open(self.path('undated'), 'wb') as file:
            file.write(b'From a@b\nSubject: x\n\ntext\n')
        done = self.run_it('learn', self.path('undated'))
        self.assertEqual(done.stdout, b'0 mails learned, of 1; without a '
                         b'date, and so left out: 1\n')
        for words, said in (
                (['list'], b'root@h: backup'),
                (['explain', 'backup'], b'comes after 24 hours'),
                (['explain', '1'], b'always              finished'),
                (['report'], b'<svg'), (['digest'], b'0 mails of 0 jobs'),
                (['--json', 'list'], b'"runs": 30'),
                (['--json', 'explain', '1'], b'"usual": "1000 to 1006"')):
            done = self.run_it(*words)
            self.assertEqual((done.returncode, done.stderr), (0, b''))
            self.assertIn(said, done.stdout)

    def test_raise_show_and_ok(self):
        self.conf('pass raised\nforward %s\n' % self.path('mbox'))
        watch = cronwatch.Watch(os.path.join(self.dir, 'state.db'))
        for number in range(20):
            watch.learn(mail(number), time.time() - (20 - number) * DAY)
        bad = mail(0, 'tape 4 failed\n')
        done = self.run_it('--json', 'deliver', '--status', data=bad)
        self.assertEqual(done.returncode, 1, done.stderr)
        found = json.loads(done.stdout)[0]
        self.assertEqual((found['kind'], found['lines']),
                         ('new line', [[4, 'tape 4 failed']]))
        with open(self.path('mbox'), 'rb') as file:
            self.assertIn(bad, file.read())
        self.assertEqual(self.run_it('show').returncode, 1)
        done = self.run_it('show', str(found['id']))
        self.assertIn(b'>    4  tape 4 failed', done.stdout)
        self.assertEqual(self.run_it('ok', str(found['id'])).returncode, 0)
        self.assertEqual(self.run_it('show').returncode, 0)
        self.assertEqual(self.run_it('ok', '77').returncode, 2)
        self.assertEqual(self.run_it('check').returncode, 0)

    def test_a_filter_says_what_was_found(self):
        done = self.run_it('deliver', '--filter', data=b'From x\n' + mail(1))
        self.assertEqual(done.stdout,
                         b'From x\nX-Cronwatch: quiet\n' + mail(1))

    def test_bad_words_are_one_line(self):
        for words in (['show', '5'], ['explain', 'nothing'],
                      ['learn', self.path('none')], ['run']):
            done = self.run_it(*words)
            self.assertEqual(done.returncode, 2)
            self.assertEqual(done.stderr.count(b'\n'), 1, done.stderr)


if __name__ == '__main__':
    unittest.main()
