# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Whose mail it is and what it says, whatever bytes it is made of."""

import base64
import os
import quopri
import random
import sys
import time
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import cronwatch                                            # noqa: E402

NOW = 1700000000.0


def mail(subject, body='', sender='root@h.example.org', headers=''):
    return ('From: %s\nSubject: %s\n%s\n%s' % (
        sender, subject, headers, body)).encode()


def read(*args, **kwargs):
    return cronwatch.mail_read(mail(*args, **kwargs), NOW)


def texts(run):
    return [text for number, text in run.lines if number]


class Jobs(unittest.TestCase):

    def same(self, *runs):
        self.assertEqual(len({run.key for run in runs}), 1,
                         [run.key for run in runs])

    def test_cron_of_debian_and_freebsd(self):
        one = read('Cron <root@h> /usr/local/bin/backup 2024-01-01', 'a\n')
        two = read('Cron <root@h> /usr/local/bin/backup 2024-01-02', 'b\n',
                   sender='"Cron Daemon" <root@other>')
        self.same(one, two)
        self.assertEqual(one.name, 'root@h: /usr/local/bin/backup 2024-01-01')
        for other in ('Cron <joe@h> /usr/local/bin/backup 2024-01-01',
                      'Cron <root@i> /usr/local/bin/backup 2024-01-01',
                      'Cron <root@h> /usr/local/bin/restore 2024-01-01'):
            self.assertNotEqual(read(other).key, one.key)

    def test_debian_says_that_it_failed(self):
        good, bad = read('Cron <root@h> x'), read('Cron <root@h> x (failed)')
        self.same(good, bad)
        self.assertEqual((good.status, bad.status), (None, 1))

    def test_anacron(self):
        self.same(read("Anacron job 'cron.daily' on h", 'a\n'),
                  read("Anacron job 'cron.daily' on h", 'b\n'))
        self.assertIn('cron.daily', read("Anacron job 'cron.daily' on h").name)

    def test_systemd(self):
        text = ('\u00d7 nightly.service - Nightly\n'
                '     Loaded: loaded (/etc/x; static)\n'
                '    Process: 9 ExecStart=/x (code=exited, status=%d/X)\n')
        bad = read('[Failed] nightly.service', text % 3)
        self.assertEqual(bad.status, 3)
        self.same(bad, read('nightly.service again', text % 0))

    def test_others_by_sender_and_subject(self):
        self.same(
            read('Backup OK on Monday, 3 June 2024'),
            read('Backup failed on Tuesday, 14 May 2024'),
            read('Re: Backup OK on Monday, 3 June 2024'))
        self.assertNotEqual(
            read('x', sender='a@example.org').key,
            read('x', sender='b@example.org').key)

    def test_the_subject_is_a_line(self):
        self.assertEqual(read('Backup failed', 'x\n').lines,
                         [(0, 'Subject: Backup failed'), (1, 'x')])

    def test_encoded_subject(self):
        coded = base64.b64encode('Prüfung'.encode()).decode()
        self.assertIn('Prüfung', read('=?utf-8?b?%s?=' % coded).name)
        self.assertIn('x', read('=?no-such?b?%s?= x' % coded).name)


class Texts(unittest.TestCase):

    def test_encodings(self):
        word = 'Größe 5 €'
        for how, charset, data in (
                ('base64', 'utf-8', base64.encodebytes(word.encode())),
                ('quoted-printable', 'utf-8',
                 quopri.encodestring(word.encode())),
                ('8bit', 'iso-8859-15', word.encode('iso-8859-15')),
                ('8bit', 'us-ascii', word.encode())):
            head = ('Content-Type: text/plain; charset=%s\n'
                    'Content-Transfer-Encoding: %s\n' % (charset, how))
            raw = mail('x', headers=head) + data
            self.assertEqual(texts(cronwatch.mail_read(raw, NOW)), [word])

    def test_plain_of_alternatives(self):
        run = read('x', '--b\nContent-Type: text/html\n\n<p>html\n--b\n'
                   'Content-Type: text/plain\n\nplain\n--b--\n',
                   headers='Content-Type: multipart/alternative; boundary=b\n')
        self.assertEqual(texts(run), ['plain'])

    def test_html_only(self):
        run = read('x', '<html><head><title>no</title></head><style>p{}'
                   '</style><body><p>one &amp; two</p>three<br>four'
                   '<table><tr><td>a</td><td>b</td></tr></table>',
                   headers='Content-Type: text/html\n')
        self.assertEqual(texts(run), ['one & two', 'three', 'four', 'a b'])

    def test_attachments_are_named(self):
        run = read('x', '--b\n\ntext\n--b\nContent-Type: application/zip\n'
                   'Content-Disposition: attachment; filename=a.zip\n\nPK\n'
                   '--b--\n',
                   headers='Content-Type: multipart/mixed; boundary=b\n')
        self.assertEqual(texts(run),
                         ['text', '[attachment: application/zip a.zip]'])

    def test_colours_and_progress(self):
        run = read('Cron <a@b> c', '\x1b[31mred\x1b[0m\n 1%\r 50%\rdone\n')
        self.assertEqual(texts(run), ['red', 'done'])

    def test_numbers_are_those_of_the_mail(self):
        run = read('Cron <a@b> c', 'one\n\nthree\n\n')
        self.assertEqual((run.lines, run.count),
                         ([(1, 'one'), (3, 'three')], 3))

    def test_a_long_mail_is_its_beginning_and_end(self):
        lines = ['line %d' % i for i in range(9000)]
        run = read('Cron <a@b> c', '\n'.join(lines))
        self.assertEqual(run.count, 9000)
        self.assertEqual(len(run.lines), cronwatch.LINES_FIRST
                         + cronwatch.LINES_LAST)
        self.assertEqual(run.lines[-1], (9000, 'line 8999'))

    def test_any_bytes_are_a_mail(self):
        seed = random.randrange(1 << 32)
        print('seed', seed)
        rng = random.Random(seed)
        whole = mail('=?utf-8?q?=C3=BC?= x', '--b\nContent-Type: text/html;'
                     ' charset=x\nContent-Transfer-Encoding: base64\n\nPGI+'
                     '\n--b\n\n\xff\n--b--\n', headers='Content-Type: '
                     'multipart/mixed; boundary="b"\n')
        for _ in range(400):
            raw = bytearray(whole)
            for _ in range(rng.randrange(1, 12)):
                at = rng.randrange(len(raw))
                raw[at:at + rng.randrange(3)] = rng.randbytes(
                    rng.randrange(3))
            run = cronwatch.mail_read(bytes(raw), NOW)
            ('\n'.join(texts(run)) + run.key + run.name).encode()
        self.assertEqual(cronwatch.mail_read(b'', NOW).lines[1:], [])


class Hostile(unittest.TestCase):
    """What was made to take for ever, or to do something to who looks."""

    MOST = 20       # seconds of work; these took minutes to hours

    def timed(self, raw):
        begin = time.process_time()
        run = cronwatch.mail_read(raw, NOW)
        miner = cronwatch.Miner()
        for _, line in run.lines:
            miner.add(line)
        self.assertLess(time.process_time() - begin, self.MOST, raw[:90])
        return run

    def test_html_that_never_ends(self):
        for piece in ('<!--', '<', '<p ', '</td ', '<script', '&#9', '&#x'):
            self.timed(mail('x', piece * ((1 << 20) // len(piece)),
                            headers='Content-Type: text/html\n'))
        # Not even a number is made of it.
        run = self.timed(mail('x', 'a&#' + '9' * 6000 + ';b &#38; c',
                              headers='Content-Type: text/html\n'))
        self.assertEqual(texts(run), ['a?b & c'])
        run = self.timed(mail('x', 'seen<!-- and all that follows',
                              headers='Content-Type: text/html\n'))
        self.assertEqual(texts(run), ['seen'])

    def test_heads_without_end(self):
        for head in ('Subject: %s' % ('a-' * 400000),
                     'From: %s' % ('a' * 900000),
                     'Subject: %s' % ('=?a?q?' * 100000),
                     'Content-Type: multipart/mixed; a="%s' % (';' * 900000),
                     'Content-Type: multipart/mixed; a="%s' % (
                         '\n ;' * 300000)):
            self.timed(head.encode() + b'\n\ntext\n')

    def test_parts_in_parts(self):
        def nested(depth, text):
            return ''.join(
                'Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n'
                % (i, i) for i in range(depth)) + '\n' + text

        for depth in (90, 500, 9000):
            run = self.timed(nested(depth, '--x\n' * 20000).encode())
            self.assertIn('--x', texts(run))
        run = self.timed(b'Subject: x\n' + b'Content-Type: message/rfc822\n\n'
                         * 9000 + b'text\n')
        self.assertIn('text', texts(run))

    def test_encodings_that_take_long(self):
        for charset in ('punycode', 'IDNA', '"punycode"'):
            run = self.timed(mail(
                'x', 'xn--' + 'a9b8' * 250000,
                headers='Content-Type: text/plain; charset=%s\n' % charset))
            self.assertTrue(texts(run)[0].startswith('xn--a9b8'))

    def test_a_log_with_lines_made_to_be_masked_for_ever(self):
        line = '1' * 500 + ':' + '1' * 499 + '\n'
        self.timed(mail('x', line * 300))

    def test_nothing_commands_a_terminal(self):
        run = read('=?utf-8?q?a=1B]0;x=07_=C2=9B2J=E2=80=AEb?=',
                   'a\x9b2Jb\x07c\x08d\x7f\te\u202ef\u2066g\u0085h\n',
                   sender='"\x1b[2J" <a\x1b@b>',
                   headers='Content-Type: text/plain; charset=utf-8\n')
        self.assertEqual(texts(run), ['a 2Jb c d \te f g h'])
        self.assertEqual(texts(read('Cron <a@b> c', '\x07\0\nx\n')), ['x'])
        for text in (run.name, run.key, run.lines[0][1]):
            self.assertTrue(text.isprintable(), ascii(text))


if __name__ == '__main__':
    unittest.main()
