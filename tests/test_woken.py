# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A server dies at night: cron, the check, an alarm, an SMS, a call, a key
pressed; and that it is over, once it is back.  By the lines of contrib/.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import unittest
import urllib.parse
import urllib.request

import rawclient
import twiliopeer
from twiliopeer import ACCOUNT, NUMBER, ROOT, TOKEN

sys.path.insert(0, ROOT)
import cronwatch  # noqa: E402

ANN = '+15550100001'


class Night(unittest.TestCase):

    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix='night-')
        self.addCleanup(shutil.rmtree, self.dir)
        self.cgi = twiliopeer.Cgi(self.addCleanup)
        self.cgi.environment = {'CRONWATCH_DIR': self.dir}
        self.twilio = twiliopeer.Peer(self.addCleanup, self.cgi.url)
        self.write('secrets', 'twilio-token %s\n' % TOKEN, 0o600)
        self.write('cronwatch.conf', (
            'person ann sms=%s call=%s\ntwilio-account %s\n'
            'twilio-number %s\ntwilio-api %s\nalarm-url %s\n' % (
                ANN, ANN, ACCOUNT, NUMBER, self.twilio.url, self.cgi.url)))
        os.mkdir(os.path.join(self.dir, 'bin'))
        self.hours = 0
        self.write('late', '0')
        # As they are installed; the clock goes on when the test says so.
        for name in ('cronwatch', 'tarsnapd'):
            self.write('bin/' + name, '#!%s\nimport sys, time\n'
                       'sys.path.insert(0, %r)\nimport %s\nnow = time.time\n'
                       'late = float(open(%r).read())\n'
                       'time.time = lambda: now() + late\n'
                       'sys.exit(%s.main())\n' % (
                           sys.executable, ROOT, name,
                           os.path.join(self.dir, 'late'), name), 0o755)
        self.server = rawclient.server_directory(self)
        self.start()
        rawclient.here('check', self.server, '--server', self.address)

    def write(self, name, text, mode=0o644):
        with open(os.path.join(self.dir, name), 'w') as file:
            file.write(text)
        os.chmod(file.name, mode)

    def start(self, port=0):
        self.serve = rawclient.Serve(self.server, '--listen',
                                     '127.0.0.1:%d' % port)
        self.addCleanup(self.serve.kill)
        self.address = '127.0.0.1:%d' % self.serve.port

    def cron(self, minutes):
        """What cron does for alarms in that time, a round in five minutes."""
        env = {'HOME': '/', 'SHELL': '/bin/sh', 'CRONWATCH_DIR': self.dir}
        jobs = []
        with open(os.path.join(ROOT, 'contrib', 'cronwatch.crontab')) as file:
            for line in file.read().splitlines():
                if line[:1].isdigit() or line[:1] == '*':
                    fields = line.split(None, 5)
                    if fields[5].split()[1] in ('escalate', 'probe'):
                        self.assertEqual(fields[1:5], ['*'] * 4)
                        jobs.append(fields[5])
                elif line and line[0] != '#':
                    env.update([line.split('=', 1)])
        env.update(SERVER=self.address, KEY=os.path.join(
            self.server, 'canary.key'))
        env['PATH'] = os.path.join(self.dir, 'bin') + ':' + env['PATH']
        self.assertEqual([shlex.split(job)[:2] for job in jobs], [
            ['cronwatch', 'escalate'], ['cronwatch', 'probe']])
        for minute in range(0, minutes, 5):
            self.hours += 5 / 60
            self.write('late', '%d' % (self.hours * 3600))
            said = [subprocess.run(
                ['/bin/sh', '-c', job], env=env, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, check=False).stdout
                for job in reversed(jobs)]
            self.assertEqual(said, ['', ''])

    def told(self):
        return [[one['to'] for one in found] for found in (
            self.twilio.messages(), self.twilio.calls())]

    def test_somebody_is_woken_and_told_that_it_is_over(self):
        self.cron(10)
        self.assertEqual(self.told(), [[], []])
        self.serve.kill()
        self.cron(5)
        self.assertEqual(self.told(), [[], []])
        self.cron(5)
        self.assertEqual(self.told(), [[ANN], []])
        self.assertRegex(self.twilio.messages()[0]['body'],
                         r'CRITICAL server: 127.0.0.1:\d+: '
                         r'Connection refused Reply ACK \d{4}')
        self.cron(15)
        self.assertEqual(self.told(), [[ANN], [ANN]])
        call, = self.twilio.calls()
        state = cronwatch.State(os.path.join(self.dir, 'state.db'))
        self.addCleanup(state.close)
        url = cronwatch.alarm_url(
            state, {'alarm-url': self.cgi.url}, 'k', state.db.execute(
                'SELECT id FROM notice WHERE sid = ?',
                (call['sid'],)).fetchone()[0])
        form = [('AccountSid', ACCOUNT), ('CallSid', call['sid']),
                ('To', ANN), ('From', NUMBER), ('Digits', '1')]
        urllib.request.urlopen(urllib.request.Request(
            url, urllib.parse.urlencode(form).encode(), {
                'X-Twilio-Signature': twiliopeer.signature(url, form)})
        ).close()
        self.cron(30)
        self.assertEqual(self.told(), [[ANN], [ANN]])
        self.start(self.serve.port)
        self.cron(5)
        self.assertEqual(self.told(), [[ANN, ANN], [ANN]])
        self.assertRegex(self.twilio.messages()[1]['body'], '^OVER ')
        self.cron(10)
        self.assertEqual(self.told(), [[ANN, ANN], [ANN]])


class Units(unittest.TestCase):

    def test_units(self):
        if shutil.which('systemd-analyze'):     # where there is systemd
            done = subprocess.run(
                ['systemd-analyze', 'verify', '--man=no'] + [
                    os.path.join(ROOT, 'contrib', 'cronwatch-escalate.' + kind)
                    for kind in ('service', 'timer')],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            self.assertEqual((done.returncode, done.stdout), (0, ''))


if __name__ == '__main__':
    unittest.main()
