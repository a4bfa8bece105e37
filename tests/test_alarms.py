# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""An alarm reaches somebody, in each way once, until somebody answers: by a
Twilio and a mail server that are there, and by ones that fail; with kills.
"""

import contextlib
import io
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
import unittest.mock
import urllib.error
import urllib.parse
import urllib.request

import faults
import mailpeer
import twiliopeer
import webpeer
from s3peers import free_ports
from twiliopeer import ACCOUNT, NUMBER, TOKEN

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
import cronwatch  # noqa: E402

ANN, BOB = '+15550100001', '+15550100002'
PEOPLE = ('person ann mail=ann@example.org sms=%s call=%s\n'
          'person bob mail=bob@example.org sms=%s call=%s\n' % (
              ANN, ANN, BOB, BOB))
MINUTE = 60
SHARE = 12                  # of the places where it may be killed


def setUpModule():
    global CGI, TWILIO, CRUEL, POST
    CGI = twiliopeer.Cgi(unittest.addModuleCleanup)
    TWILIO = twiliopeer.Peer(unittest.addModuleCleanup, CGI.url)
    CRUEL = twiliopeer.Cruel(unittest.addModuleCleanup)
    POST = mailpeer.Peer(unittest.addModuleCleanup)


class Case(unittest.TestCase):

    twilio = None               # by default the one that is cruel

    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix='alarms-')
        self.addCleanup(shutil.rmtree, self.dir)
        CRUEL.forget()
        POST.forget()
        self.said = []
        self.now = time.time()
        CRUEL.clock = lambda: self.now
        self.write('secrets', 'twilio-token %s\n' % TOKEN)
        self.configure()
        self.state = cronwatch.State(os.path.join(self.dir, 'state.db'))
        self.addCleanup(self.state.db.close)

    def write(self, name, text, mode=0o600):
        with open(os.path.join(self.dir, name), 'w') as file:
            file.write(text)
        os.chmod(file.name, mode)
        return file.name

    def configure(self, people=PEOPLE, more=''):
        path = self.write('cronwatch.conf', people + (
            'mail-from Alarms <alarms@example.org>\n'
            'mail-smtp 127.0.0.1:%d\nmail-tls no\n'
            'twilio-account %s\ntwilio-number %s\ntwilio-api %s\n'
            'alarm-url %s\n' % (POST.port, ACCOUNT, NUMBER, (
                self.twilio or CRUEL).url, CGI.url)) + more)
        self.conf = cronwatch.conf_read(path, cronwatch.OPTIONS)

    def alarm(self, text='the front door is dead', severity='critical',
              cause=None):
        with self.state.change():
            return cronwatch.alarm_raise(self.state, severity, cause, text,
                                         self.now)

    def over(self, number):
        with self.state.change():
            cronwatch.alarm_over(self.state, number, self.now, 'it is back')

    def send(self, minutes=0):
        """What is sent when so much more time has gone by."""
        self.now += minutes * MINUTE
        cronwatch.alarms_send(self.state, self.conf, self.now,
                              self.said.append)

    def told(self):
        """[(way, who)] of all that was sent, SMS and calls in their order."""
        names = {ANN: 'ann', BOB: 'bob'}
        return [({'Messages': 'sms', 'Calls': 'call'}[one['kind']],
                 names[one['to']]) for one in CRUEL.made]

    def mailed(self):
        return [mail['to'][0].partition('@')[0] for mail in POST.mails()]

    def notice(self, number=1):
        return self.state.db.execute('SELECT * FROM notice WHERE id = ?',
                                     (number,)).fetchone()

    def stood(self, number=1):
        """What has become of an alarm, and who did it."""
        return tuple(self.state.db.execute(
            'SELECT state, who, why FROM alarm WHERE id = ?',
            (number,)).fetchone())

    def command(self, *words):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cronwatch.main(['--dir', self.dir, *words])
        return status, out.getvalue(), err.getvalue()

    def page(self, url, form=None, signed=None, token=TOKEN):
        """(status, body) of a request; signed for the URL `signed`."""
        pairs = form and list(form.items())
        request = urllib.request.Request(
            url, None if form is None else urllib.parse.urlencode(
                pairs).encode())
        if signed:
            request.add_header('X-Twilio-Signature', twiliopeer.signature(
                signed, pairs, token))
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as e:
            with e:
                return e.code, e.read().decode()

    def link(self):
        return re.search(r'http://\S+\?l=\d+\.\w+', POST.mails()[0][
            'text'].replace('=\r\n', '').replace('=\n', '').replace(
                '=3D', '=')).group()


ROUND = [('sms', 'ann'), ('call', 'ann'), ('call', 'ann'),
         ('sms', 'bob'), ('call', 'bob'), ('call', 'bob')]


class Plan(Case):

    def test_sms_then_calls_then_the_second_person_and_around_again(self):
        self.alarm()
        self.send()
        self.assertEqual(self.told(), ROUND[:1])
        self.assertEqual(self.mailed(), ['ann'])
        for minute in range(60):
            self.send(1)
            self.send()
            self.assertEqual(self.told(),
                             (ROUND + ROUND)[:1 + (minute + 1) // 10])
        for _ in range(30):
            self.send(10)
        self.assertEqual(self.told(), ROUND * 3)
        self.assertEqual(self.said, [])

    def test_a_warning_calls_nobody_and_a_notice_is_a_mail(self):
        self.alarm(severity='warning')
        self.send()
        for _ in range(9):
            self.send(10)
        self.assertEqual(self.told(), [('sms', 'ann'), ('sms', 'bob')])
        POST.forget()
        self.alarm(severity='notice')
        for _ in range(9):
            self.send(10)
        self.assertEqual(len(self.told()), 2)
        self.assertEqual(self.mailed(), ['ann'])

    def test_acknowledged_is_the_end(self):
        number = self.alarm()
        self.send()
        self.send(10)
        cronwatch.alarm_ack(self.state, [number], 'ann', 'here', self.now)
        for _ in range(9):
            self.send(10)
        self.assertEqual(self.told(), ROUND[:2])
        self.assertEqual(self.stood(), ('acked', 'ann', 'here'))
        self.assertEqual(cronwatch.alarm_ack(
            self.state, [number], 'bob', 'late', self.now), [])

    def test_over_is_told_to_who_was_told(self):
        number = self.alarm('disk\n1: full')
        self.send()
        self.over(number)
        for _ in range(9):
            self.send(10)
        self.assertEqual(self.told(), [('sms', 'ann')] * 2)
        self.assertEqual(CRUEL.made[-1]['body'], 'OVER disk')
        self.assertEqual(self.mailed(), ['ann', 'ann'])
        number = self.alarm()
        self.over(number)
        self.send()
        self.assertEqual(len(self.told()), 2)

    def test_one_cause_is_one_alarm_until_it_is_worse(self):
        first = self.alarm(severity='warning', cause='door')
        self.send()
        for _ in range(5):
            self.assertEqual(self.alarm(severity='warning', cause='door'),
                             first)
        self.send()
        self.assertEqual(self.told(), ROUND[:1])
        cronwatch.alarm_ack(self.state, [first], 'ann', 'here', self.now)
        self.assertEqual(self.alarm(cause='door'), first)
        self.send()
        self.send(10)
        self.assertEqual(self.told(), ROUND[:1] + ROUND[:2])
        self.over(first)
        self.assertNotEqual(self.alarm(cause='door'), first)

    def test_many_alarms_are_one_sms_and_one_call(self):
        numbers = [self.alarm('job %d failed' % n) for n in range(30)]
        self.send()
        self.send(10)
        self.assertEqual(self.told(), ROUND[:2])
        self.assertIn('CRITICAL job 0 failed (and 29 more alarms)',
                      CRUEL.made[0]['body'])
        self.assertEqual(self.mailed(), ['ann'])
        self.assertIn('job 29 failed', POST.mails()[0]['text'])
        cronwatch.alarm_ack(self.state, numbers, 'ann', 'here', self.now)

    def test_a_night_of_quiet(self):
        self.configure(people=PEOPLE.replace(
            'sms=' + ANN, 'quiet=22:00-07:00 zone=Etc/GMT-2 sms=' + ANN))
        self.now = 1795723200.0         # 22:00 there; the night ends at 7
        self.alarm(severity='warning')
        self.send()
        self.assertEqual((self.told(), self.mailed()), ([], ['ann']))
        for _ in range(8):
            self.send(60)
        self.assertEqual(self.told(), [])
        self.send(60)
        self.assertEqual(self.told(), [('sms', 'ann')])
        self.send(9)
        self.assertEqual(self.told(), [('sms', 'ann')])
        self.send(1)
        self.assertEqual(self.told(), [('sms', 'ann'), ('sms', 'bob')])
        self.now -= 3600 * 2
        self.alarm()
        self.send()
        self.assertEqual(self.told()[2:], [('sms', 'ann')])

    def test_hours_of_quiet_by_day_and_over_midnight(self):
        person = cronwatch.Person('x quiet=22:30-07:00 zone=UTC')
        day = 1795651200                # a midnight
        for hour, wake in ((0, 7), (6.99, 7), (7, 7), (12, 12), (22.4, 22.4),
                           (22.5, 31), (23, 31)):
            self.assertEqual(person.awake(day + hour * 3600),
                             day + wake * 3600)
        person = cronwatch.Person('x quiet=13:00-14:00 zone=UTC')
        for hour, wake in ((12, 12), (13.5, 14), (14, 14)):
            self.assertEqual(person.awake(day + hour * 3600),
                             day + wake * 3600)

    def test_after_a_long_sleep_not_all_at_once(self):
        self.alarm()
        self.send()
        self.send(300)
        self.assertEqual(self.told(), ROUND[:2])
        self.send(9)
        self.assertEqual(self.told(), ROUND[:2])
        self.send(1)
        self.assertEqual(self.told(), ROUND[:3])

    def test_who_is_not_configured_any_more_is_left_out(self):
        self.alarm()
        self.send()
        self.configure(people=PEOPLE.partition('\n')[2])
        for _ in range(3):
            self.send(10)
        self.assertEqual(self.told(), ROUND[:1] + ROUND[3:4])

    def test_a_finding_is_an_alarm(self):
        with self.state.change():
            job = self.state.db.execute(
                'INSERT INTO job(key, name, runs, seen, miner, memory)'
                " VALUES ('k', 'backup', 1, 0, '', '')").lastrowid
            number = self.state.db.execute(
                'INSERT INTO finding(job, at, kind, severity, reason, also,'
                " lines, causes, token) VALUES (?, ?, 'new line', 'critical',"
                " 'a new line', '[\"it is long\"]', ?, '{}', 'abcd')", (
                    job, self.now, '[[7, "rsync: failed"]]')).lastrowid
            finding = self.state.finding(number)
            cronwatch.raise_alarm(self.state, finding, self.now)
            cronwatch.raise_alarm(self.state, finding, self.now)
        self.send()
        self.assertEqual(self.told(), ROUND[:1])
        mail = POST.mails()[0]['text']
        for text in ('backup: a new line', 'it is long', '7: rsync: failed',
                     'cronwatch ok %d' % number, '%d-abcd@' % number):
            self.assertIn(text, mail)
        with self.state.change():
            cronwatch.end_alarm(self.state, finding, self.now, 'it came')
        self.send()
        self.assertEqual(self.told(), [('sms', 'ann')] * 2)


class Answers(Case):
    """With a Twilio that signs, and a CGI program that looks."""

    def setUp(self):
        self.twilio = TWILIO
        TWILIO.clear()
        super().setUp()
        CGI.environment = {'CRONWATCH_DIR': self.dir,
                           'PATH': os.environ['PATH']}
        self.number = self.alarm()
        self.send()

    def test_an_sms_and_a_reply(self):
        message, = TWILIO.messages()
        self.assertEqual((message['to'], message['from']), (ANN, NUMBER))
        code, = re.fullmatch('CRITICAL the front door is dead '
                             r'Reply ACK (\d{4})', message['body']).groups()
        TWILIO.reply('+15559999999', 'ACK ' + code)
        form = {'AccountSid': ACCOUNT, 'MessageSid': 'SM9', 'To': NUMBER,
                'From': '+15559999999', 'Body': 'ACK ' + code}
        self.assertEqual(self.page(CGI.url, form, CGI.url), (
            200, '<?xml version="1.0" encoding="UTF-8"?><Response></Response>'
        ))
        TWILIO.reply(ANN, 'what? ')
        TWILIO.reply(ANN, 'ack %04d' % ((int(code) + 1) % 10000))
        self.assertEqual(self.stood()[0], 'open')
        TWILIO.reply(ANN, 'ack ' + code)
        self.assertEqual(self.stood(), ('acked', 'ann', 'SMS'))

    def test_ok_is_enough(self):
        TWILIO.reply(BOB, 'OK')         # who was not told
        self.assertEqual(self.stood()[0], 'open')
        TWILIO.reply(ANN, 'Ok!')
        self.assertEqual(self.stood(), ('acked', 'ann', 'SMS'))

    def test_stop_and_start(self):
        TWILIO.reply(ANN, 'STOP')
        self.alarm('another')
        self.send()
        self.assertEqual(len(TWILIO.messages()), 1)
        self.assertIn('STOP', self.said[0])
        self.assertEqual(len(TWILIO.calls()), 1)    # what comes next
        self.assertIn(ANN + ' said STOP', self.command('alarms')[1])
        TWILIO.reply(ANN, 'start')
        self.alarm('a third')
        self.send()
        self.assertEqual(len(TWILIO.messages()), 2)

    def test_a_message_that_did_not_arrive_makes_the_next_step_due(self):
        TWILIO.status('message', TWILIO.messages()[0]['sid'], 'undelivered')
        self.assertEqual(self.notice()['state'], 'failed')
        self.send(1)
        self.assertEqual([one['to'] for one in TWILIO.calls()], [ANN])

    def test_a_call_and_a_key(self):
        self.send(10)
        call, = TWILIO.calls()
        notice = self.notice(3)
        self.assertEqual((call['to'], call['sid']), (ANN, notice['sid']))
        url = cronwatch.alarm_url(self.state, self.conf, 'k', 3)
        form = {'AccountSid': ACCOUNT, 'CallSid': call['sid'], 'To': ANN,
                'From': NUMBER, 'Digits': '1', 'Empty': '', 'Umlaut': 'ä&='}
        refused = (403, 'Forbidden\n')
        for wrong, signed, token in (
                (form, None, TOKEN), (form, url, 'another'),
                (form, CGI.url, TOKEN), (dict(form, To=BOB), url, TOKEN),
                (dict(form, CallSid='CA1'), url, TOKEN),
                (dict(form, AccountSid='AC1'), url, TOKEN)):
            self.assertEqual(self.page(url, wrong, signed, token), refused)
        for other in (url[:-1] + '?', url.replace('k=3', 'k=2'),
                      url.replace('k=', 'l='), url + '&x=1',
                      CGI.url + '?' + 'x' * 5000):
            self.assertEqual(self.page(other, form, other), refused)
        self.assertEqual(self.page(url), refused)
        status, said = self.page(url, dict(form, Digits='7'), url)
        self.assertIn('Press 1', said)
        self.assertEqual(self.stood()[0], 'open')
        status, said = self.page(url, form, url)
        self.assertEqual((status, self.stood()),
                         (200, ('acked', 'ann', 'phone')))
        self.assertNotIn('Gather', said)

    def test_a_link_is_followed_without_effect(self):
        link = self.link()
        for _ in range(2):
            status, page = self.page(link)
            self.assertEqual(status, 200)
            self.assertIn('the front door is dead', page)
            self.assertEqual(self.stood()[0], 'open')
        self.assertEqual(self.page(link[:-1] + 'g', {})[0], 403)
        self.assertEqual(self.page(link.replace('?l=2', '?l=1'), {})[0], 403)
        status, page = self.page(link, {})
        self.assertEqual(self.stood(), ('acked', 'ann', 'link'))
        self.assertIn('ann takes care of it', page)
        self.assertNotIn('<button>', page)

    def test_a_message_that_is_played_again_does_nothing(self):
        form = {'AccountSid': ACCOUNT, 'MessageSid': 'SM1', 'From': ANN,
                'To': NUMBER, 'Body': 'OK'}
        self.assertIn('Yours: the front', self.page(CGI.url, form, CGI.url)[1])
        self.alarm('another')
        self.send()
        self.assertEqual(self.page(CGI.url, form, CGI.url)[0], 200)
        self.assertEqual(self.stood(2)[0], 'open')

    def test_bodies_are_bounded_and_must_be_forms(self):
        environ = {'REQUEST_METHOD': 'POST', 'CONTENT_TYPE':
                   'application/x-www-form-urlencoded'}
        for length, more in (('65537', {}), ('-1', {}), ('', {}), ('x', {}),
                             ('1', {'CONTENT_TYPE': 'application/json'}),
                             ('1', {'REQUEST_METHOD': 'PUT'}),
                             ('99999999999999999999', {})):
            body = io.BytesIO(b'x' * 70000)
            with self.assertRaises(cronwatch.Forbidden):
                cronwatch.alarm_answer(
                    self.state, self.conf, dict(
                        environ, CONTENT_LENGTH=length, **more),
                    body, self.now)
            self.assertEqual(body.tell(), 0)


class UnderApache(Case):

    def setUp(self):
        if not shutil.which('apache2', path=webpeer.SEARCH):
            self.skipTest('no apache2 (Debian: apache2-bin)')
        self.port, = free_ports(1)
        patch = unittest.mock.patch.object(
            CGI, 'url', 'http://127.0.0.1:%d/alarm.cgi' % self.port)
        patch.start()
        self.addCleanup(patch.stop)
        super().setUp()

    def serve(self):
        """Apache with the lines of the manual, as whose alarms these are."""
        root = tempfile.mkdtemp(prefix='apache-', dir='/tmp')
        self.addCleanup(shutil.rmtree, root)
        os.mkdir(os.path.join(root, 'cgi-bin'))
        for name in ('cronwatch.py', 'cgi-bin/alarm.cgi'):
            shutil.copy(os.path.join(ROOT, name), os.path.join(root, name))
        with open(os.path.join(ROOT, 'man', 'cronwatch.1')) as file:
            lines, = re.findall(r'with Apache:\n\.Bd [^\n]*\n(.*?)\.Ed',
                                file.read(), re.S)
        for there, here in (('/usr/local/lib/cronwatch', root),
                            ('/home/ann/.cronwatch', self.dir),
                            ('SuexecUserGroup ann ann\n', '')):
            self.assertIn(there, lines)
            lines = lines.replace(there, here)
        with open(os.path.join(root, 'conf'), 'w') as file:
            file.write('Define WEB_SITE /dev/null\nInclude %s\n%s'
                       '<Directory %s/cgi-bin>\nRequire all granted\n'
                       '</Directory>\n' % (os.path.join(
                           ROOT, 'contrib', 'tarsnap-web-httpd.conf'),
                           lines, root))
        os.mkdir(os.path.join(root, 'bin'))
        os.symlink(webpeer.python(), os.path.join(root, 'bin', 'python3'))
        argv = [shutil.which('apache2', path=webpeer.SEARCH), '-DFOREGROUND',
                '-DWEB_PLAIN', '-f', file.name]
        for name, value in (('LISTEN', '127.0.0.1:%d' % self.port),
                            ('RUN', root), ('LOG', root), ('DIR', root)):
            argv += ['-C', 'Define WEB_%s %s' % (name, value)]
        if os.getuid() == 0:
            argv[:0] = ['setpriv', '--reuid', str(webpeer.NOBODY), '--regid',
                        str(webpeer.NOBODY), '--clear-groups']
            for place, _, names in [*os.walk(root), *os.walk(self.dir)]:
                for path in (place, *(os.path.join(place, name)
                                      for name in names)):
                    os.chown(path, webpeer.NOBODY, webpeer.NOBODY,
                             follow_symlinks=False)
        child = subprocess.Popen(argv, stdout=subprocess.DEVNULL,
                                 stderr=subprocess.DEVNULL, env={
                                     'PATH': os.path.join(root, 'bin')
                                     + ':/usr/bin:/bin'})
        self.addCleanup(child.wait)
        self.addCleanup(child.terminate)
        webpeer.listening(self.port, child)

    def test_as_the_manual_says(self):
        first = self.alarm()
        self.send()
        link = self.link()
        self.serve()
        self.assertIn('the front door is dead', self.page(link)[1])
        self.assertEqual(self.page(link, {})[0], 200)
        self.assertEqual(self.stood(first), ('acked', 'ann', 'link'))
        second = self.alarm('the back door, too')
        self.send()
        form = {'AccountSid': ACCOUNT, 'MessageSid': 'SM1', 'From': ANN,
                'To': NUMBER, 'Body': 'OK'}
        self.assertEqual(self.page(CGI.url, form, CGI.url + 'x')[0], 403)
        self.assertEqual(self.page(CGI.url, form, CGI.url)[0], 200)
        self.assertEqual(self.stood(second), ('acked', 'ann', 'SMS'))


class Signatures(unittest.TestCase):

    def test_the_example_of_the_manual(self):
        self.assertEqual(cronwatch.twilio_signature(
            '12345', 'https://mycompany.com/myapp.php?foo=1&bar=2', [
                ('CallSid', 'CA1234567890ABCDE'), ('Caller', '+14158675309'),
                ('Digits', '1234'), ('From', '+14158675309'),
                ('To', '+18005551212')]), 'RSOYDt4T1cUTdK1PDd93/VVr8B8=')

    def test_names_that_come_twice(self):
        url = 'https://a.example/'
        self.assertEqual(
            cronwatch.twilio_signature('k', url, [
                ('b', '2'), ('a', 'x'), ('b', '1'), ('b', '2')]),
            cronwatch.twilio_signature('k', url + 'axb1b2', []))

    def test_ports(self):
        for url, both in (
                ('https://a.b/c?d', ['https://a.b/c?d',
                                     'https://a.b:443/c?d']),
                ('https://a.b:8443/c', ['https://a.b/c',
                                        'https://a.b:8443/c']),
                ('http://[::1]/', ['http://[::1]/', 'http://[::1]:80/']),
                ('https://u:p@a.b/', ['https://u:p@a.b/',
                                      'https://u:p@a.b:443/'])):
            self.assertEqual(cronwatch.twilio_urls(url), both)


class Texts(Case):

    def test_parts_of_an_sms(self):
        self.assertEqual(len(cronwatch.GSM), 127)
        for text, parts in (
                ('', 1), ('a' * 160, 1), ('a' * 161, 2), ('a' * 306, 2),
                ('a' * 307, 3), ('€' * 80, 1), ('€' * 81, 2),
                # 153 is odd: an escape and its letter stay together.
                ('€' * 152, 2), ('€' * 153, 3), ('ю' * 70, 1), ('ю' * 71, 2),
                ('ю' * 134, 2), ('ю' * 135, 3), ('😀' * 35, 1),
                ('😀' * 36, 2), ('😀' * 66, 2), ('😀' * 67, 3)):
            with self.subTest(text[:1] + str(len(text))):
                self.assertEqual(cronwatch.sms_parts(text), parts)

    def test_a_text_is_cut_and_its_end_stays(self):
        for letter in 'a€ю😀':
            for most in (1, 2, 3):
                text = cronwatch.sms_fit(letter * 1000, ' Reply 1', most)
                self.assertEqual(cronwatch.sms_parts(text), most)
                self.assertTrue(text.endswith('... Reply 1'))
        self.assertEqual(cronwatch.sms_fit('“quoted”\n\x1b[31m–x', '', 1),
                         '"quoted" [31m-x')

    def test_what_is_spoken_is_escaped(self):
        self.alarm('<Dial>1</Dial> & "more"')
        self.send()
        self.send(10)
        spoken = CRUEL.made[-1]['twiml']
        self.assertIn('&lt;Dial&gt;1&lt;/Dial&gt; &amp; "more"', spoken)
        self.assertEqual(spoken.count('<Gather'), 2)

    def test_a_line_of_an_alarm_is_no_header(self):
        self.alarm('x\r\nBcc: all@example.org')
        self.send()
        self.assertEqual(POST.mails()[0]['to'], ['ann@example.org'])
        self.assertNotIn('\nBcc:', POST.mails()[0]['text'].partition(
            '\r\n\r\n')[0])


class Faults(Case):

    def test_busy_and_away_are_tried_again(self):
        for number, what in enumerate(('429', '401 20003', '404', '429')):
            CRUEL.plan(what)
            self.alarm('one %d' % number, 'warning')
            self.send()
            self.assertEqual(len(self.told()), number)
            self.send()
            self.assertEqual(len(self.told()), number)
            self.send(1)
            self.assertEqual(len(self.told()), number + 1)

    def test_what_is_unclear_is_asked_for(self):
        for number, what in enumerate(('took', 'drop', '500', '503')):
            alarm = self.alarm('one %d' % number, 'warning')
            CRUEL.plan(what)
            self.send()
            self.assertEqual(len(self.told()), number + (what == 'took'))
            for _ in range(4):
                self.send(0.5)
            self.assertEqual(len(self.told()), number + 1)
            self.over(alarm)
            self.state.db.execute("DELETE FROM step WHERE kind = 'over'")
        self.assertEqual(self.told(), [('sms', 'ann')] * 4)

    def test_a_call_that_is_unclear_is_not_made_again(self):
        self.alarm()
        self.send()
        for what in ('took', 'took 40'):
            CRUEL.plan(what)
            self.send(10)
            made = self.told()
            for _ in range(9):
                self.send(1)
            self.assertEqual(self.told(), made)
        self.assertEqual(self.told(), ROUND[:3])
        self.assertEqual({row[0] for row in self.state.db.execute(
            'SELECT state FROM notice')}, {'sent'})

    def test_what_waits_goes_along_or_is_not_sent_any_more(self):
        CRUEL.plan('429')
        first = self.alarm('one', severity='warning')
        self.send()
        self.alarm('two', severity='warning')
        self.send(1)
        self.assertEqual(self.told(), [('sms', 'ann')])
        self.assertIn('one (and 1 more alarm)', CRUEL.made[0]['body'])
        CRUEL.forget()
        CRUEL.plan('429')
        first = self.alarm('three', severity='warning')
        self.send()
        cronwatch.alarm_ack(self.state, [first], 'ann', 'here', self.now)
        self.send(1)
        self.assertEqual(self.told(), [])

    def test_what_is_unclear_for_long_holds_nothing_up(self):
        CRUEL.plan('took')
        self.alarm('one', severity='warning')
        self.send()
        with unittest.mock.patch.object(
                cronwatch, 'twilio_find', side_effect=cronwatch.Later('no')):
            self.alarm('two')
            for _ in range(11):
                self.send(1)
        self.assertEqual(self.told(), [
            ('sms', 'ann'), ('sms', 'bob'), ('call', 'ann')])
        for _ in range(7):
            self.send(1)
        self.assertEqual(len(self.told()), 3)

    def test_an_earlier_call_is_not_taken_for_one_that_was_lost(self):
        self.configure(people=PEOPLE.partition('\n')[0] + '\n')
        self.alarm('one')
        self.send()
        self.send(2)
        self.alarm('two')
        self.send()
        self.send(8)
        CRUEL.plan('drop')
        self.send(2)
        self.assertEqual(self.told().count(('call', 'ann')), 1)
        for _ in range(4):
            self.send(0.5)
        self.assertEqual(self.told().count(('call', 'ann')), 2)

    def test_what_is_listed_late_is_not_sent_again(self):
        CRUEL.plan('took 50')
        number = self.alarm(severity='warning')
        for _ in range(4):
            self.send(0.5)
        self.assertEqual(self.told(), [('sms', 'ann')])
        # Also who turns out to have been told is told that it is over.
        CRUEL.forget()
        CRUEL.plan('took 50')
        number = self.alarm(severity='warning')
        self.send()
        self.over(number)
        for _ in range(4):
            self.send(0.5)
        self.assertEqual(self.told(), [('sms', 'ann')] * 2)
        self.assertIn('OVER', CRUEL.made[1]['body'])

    def test_nobody_answers_at_twilio(self):
        self.configure(more='twilio-api http://127.0.0.1:9\n')
        self.alarm(severity='warning')
        for _ in range(9):
            self.send(1)
        self.assertEqual(self.mailed(), ['ann'])
        self.configure()
        self.send(10)
        self.assertIn(('sms', 'ann'), self.told())

    def test_a_number_that_cannot_be_is_passed_over_at_once(self):
        CRUEL.plan('400 21211')
        self.alarm()
        self.send()
        self.send()
        self.assertEqual(self.told(), [('call', 'ann')])
        CRUEL.plan('400 21610')
        self.alarm('another')
        self.send()
        self.alarm('a third')
        self.send()
        self.assertEqual(self.told()[1:], [('call', 'ann')] * 2)

    def test_what_fails_again_and_again_is_given_up(self):
        self.configure(people=PEOPLE.partition('\n')[0] + '\n')
        CRUEL.plan(*['500'] * 30)
        self.alarm(severity='warning')
        for _ in range(90):
            self.send(1)
        self.assertEqual((self.notice()['state'], self.notice()['tries']),
                         ('failed', cronwatch.TRIES))

    def test_a_fault_of_ours_keeps_no_other_from_being_told(self):
        def fails(*_):
            raise ZeroDivisionError('a fault')
        with unittest.mock.patch.dict(cronwatch.SENDERS, sms=fails):
            self.alarm()
            self.send()
        self.assertEqual(self.said, ['sms to ann: ZeroDivisionError: a fault'])
        self.assertEqual(self.mailed(), ['ann'])
        self.send(1)
        self.send(1)
        self.assertEqual(self.told(), [('sms', 'ann')])

    def test_the_token_goes_nowhere_else(self):
        CRUEL.plan('302')
        self.alarm(severity='warning')
        self.send()
        self.assertEqual([method for method, _ in CRUEL.asked], ['POST'])
        self.send(1)
        self.assertEqual(self.told(), [('sms', 'ann')])

    def test_it_is_given_up_in_the_end(self):
        self.configure(people=PEOPLE.partition('\n')[0] + '\n')
        CRUEL.plan(*['429'] * 9)
        self.alarm(severity='warning')
        for _ in range(60):
            self.send(1)
        self.assertEqual(self.notice()['state'], 'failed')
        self.assertEqual(self.told(), [])
        self.alarm('another', severity='warning')
        self.send()
        self.assertEqual(self.told(), [('sms', 'ann')])

    def test_mail_that_is_refused_put_off_or_unclear(self):
        POST.plan('rcpt 450', 'data 451', 'took')
        self.alarm(severity='notice')
        for _ in range(20):
            self.send(1)
        mails = POST.mails()
        self.assertEqual(len(mails), 2)     # one was taken, and not said so
        ids = {re.search('(?im)^message-id: (.*?)\r?$',
                         mail['text']).group(1) for mail in mails}
        self.assertEqual(len(ids), 1)
        POST.forget()
        POST.plan('rcpt 550')
        self.configure(people='person ann mail=ann@example.org\n'
                       'person bob mail=bob@example.org\n')
        self.alarm(severity='warning')
        self.send()
        self.assertEqual(self.mailed(), ['bob'])

    def test_mail_over_tls_with_a_password(self):
        for tls in ('starttls', 'tls'):
            peer = mailpeer.Peer(self.addCleanup, tls)
            self.write('secrets', 'mail-password %s\n' % mailpeer.PASSWORD)
            self.configure(more='mail-smtp localhost:%d\nmail-tls %s\n'
                           'mail-user %s\nmail-ca-bundle %s\n' % (
                               peer.port, tls, mailpeer.USER, peer.ca))
            self.alarm(severity='notice')
            self.send()
            self.assertEqual(len(peer.mails()), 1, self.said)

    def test_mail_by_a_program(self):
        script = self.write('sendmail', '#!/bin/sh\necho "$@" > %s/args\n'
                            'cat > %s/mail\n' % (self.dir, self.dir), 0o700)
        path = self.write('c', PEOPLE + 'mail-from <a@example.org>\n'
                          'mail-sendmail %s\n' % script)
        self.conf = cronwatch.conf_read(path, cronwatch.OPTIONS)
        self.alarm('größer', severity='notice')
        self.send()
        with open(os.path.join(self.dir, 'args')) as file:
            self.assertEqual(file.read(),
                             '-i -f a@example.org ann@example.org\n')
        with open(os.path.join(self.dir, 'mail'), 'rb') as file:
            mail = file.read()
        self.assertNotIn(b'\r', mail)
        self.assertIn(b'\nSubject: NOTICE =?utf-8?', mail)

    def test_secrets_that_others_can_read_are_not_used(self):
        self.write('secrets', 'twilio-token %s\n' % TOKEN, 0o640)
        self.alarm()
        self.send()
        self.assertEqual(self.told(), [])
        self.assertIn('others can read it', self.said[0])


class Processes(Case):

    def start(self, *words, **options):
        """A process with a clock of its own; settles at once."""
        return subprocess.Popen(
            [sys.executable, '-c', 'import sys; sys.path.insert(0, %r);'
             'import cronwatch; cronwatch.SETTLE = 0;'
             'sys.exit(cronwatch.main(sys.argv[1:]))' % ROOT,
             '--dir', self.dir, *words], stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, **options)

    def test_many_at_once_send_once(self):
        self.alarm()
        running = [self.start('escalate') for _ in range(4)]
        for child in running:
            self.assertEqual(child.wait(), 0)
        self.assertEqual((self.told(), self.mailed()), (ROUND[:1], ['ann']))

    def kill(self, at, what, mask):
        """A call and an SMS are due.  The process that makes them is killed
        at its n-th call, and then comes one that is not; False if there were
        fewer calls.
        """
        CRUEL.forget()
        self.now = time.time() - 1
        with self.state.change():
            for table in ('step', 'notice', 'alarm'):
                self.state.db.execute('DELETE FROM ' + table)
        self.alarm()
        with self.state.change():
            self.state.db.execute('UPDATE alarm SET planned = 1')
            self.state.db.execute(
                "INSERT INTO step(alarm, kind, after, person, way)"
                " SELECT id, 'raise', 0, 'ann', 'call' FROM alarm UNION"
                " SELECT id, 'raise', 0, 'bob', 'sms' FROM alarm")
        self.page.set(at, what, 0, mask)
        code = self.start('escalate', env=dict(
            os.environ, LD_PRELOAD=self.library, FAULTS_LOG=os.devnull,
            FAULTS_STATE=self.page.path)).wait()
        self.assertIn(code, (0, -9))
        CRUEL.wait()
        self.now = time.time()
        with unittest.mock.patch.object(cronwatch, 'SETTLE', 0):
            self.send()
            self.send(1)
        self.assertEqual(sorted(self.told()), [
            ('call', 'ann'), ('sms', 'bob')], 'killed at %d' % at)
        self.assertEqual({row[0] for row in self.state.db.execute(
            'SELECT state FROM notice')}, {'sent'})
        return code != 0

    def test_killed_at_any_call_it_sends_each_once(self):
        where = tempfile.mkdtemp(prefix='faults-')
        self.addCleanup(shutil.rmtree, where)
        self.library = faults.build(where)
        self.page = faults.Faults(os.path.join(where, 'state'))
        self.page.watch(self.dir)
        at = 1
        while self.kill(at, faults.KILL, faults.NETWORK):
            at += 1
        self.assertGreater(at, 6)
        both = faults.NETWORK | faults.WRITES
        self.kill(10 ** 6, faults.PASS, both)
        points = range(1, self.page.count)
        seed = random.randrange(2 ** 32)
        print('seed', seed, 'points', len(points))
        for at in random.Random(seed).sample(points, min(
                SHARE, len(points))):
            self.assertTrue(self.kill(at, random.Random(seed + at).choice(
                (faults.KILL, faults.AFTER)), both))


class Commands(Case):

    def test_raise_list_ack_and_over(self):
        status, out, err = self.command('raise', '--cause', 'door', 'it',
                                        'is', 'dead')
        self.assertEqual((status, err), (0, ''))
        number = out.strip()
        self.assertEqual(self.told(), ROUND[:1])
        out = self.command('alarms')[1]
        self.assertRegex(out, r'\A%s critical since \w+ \d\d:\d\d\n'
                         '    it is dead\n' % number)
        self.assertEqual(out.count('call to ann'), 1)
        self.assertEqual(self.command('ack', 'door')[0], 0)
        self.assertIn('takes care of it', self.command('alarms')[1])
        self.assertEqual(self.command('over', number, 'it', 'lives')[0], 0)
        self.assertEqual(self.command('alarms')[1], '')
        self.assertIn('over: it lives', self.command('alarms', '--all')[1])
        self.assertIn('it lives', POST.mails()[-1]['text'])

    def test_a_probe_is_an_alarm_and_its_end(self):
        flag = os.path.join(self.dir, 'flag')
        words = ('probe', '--cause', 'flag', '--times', '2', '--', 'sh', '-c',
                 'test -e %s && echo here || { echo gone; exit 2; }' % flag)
        self.assertEqual(self.command(*words)[0], 2)
        self.assertEqual(self.told(), [])
        self.assertEqual(self.command(*words)[0], 2)
        self.assertEqual(self.told(), ROUND[:1])
        self.command(*words)
        self.assertEqual(self.told(), ROUND[:1])
        open(flag, 'w').close()
        self.assertEqual(self.command(*words)[0], 0)
        self.assertEqual(CRUEL.made[-1]['body'], 'OVER flag: gone')
        self.assertEqual(self.command('probe', '--timeout', '1', '--',
                                      'sleep', '9')[0], 2)
        self.assertEqual(self.command('probe', '--', '/nonexistent')[0], 3)

    def test_configurations_that_are_wrong(self):
        for text in ('person', 'person a=b', 'person a sms=0123',
                     'person a mail=x', 'person a quiet=22-7',
                     'person a quiet=25:00-07:00', 'person a zone=No/Where',
                     'alarm-minutes 0', 'alarm-minutes x', 'alarm-sms loud',
                     'alarm-url http://example.org/', 'alarm-url x',
                     'twilio-api http://example.org', 'mail-smtp a:b',
                     'mail-tls ssl', 'twilio-number 5', 'mail-from x',
                     'mail-from A <b', 'alarm-url https://u:p@a.b/',
                     'person a mail=\xfc@a.b'):
            with self.subTest(text), self.assertRaises(cronwatch.Error):
                cronwatch.conf_read(self.write('c', text + '\n'),
                                    cronwatch.OPTIONS)


if __name__ == '__main__':
    unittest.main()
