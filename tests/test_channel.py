# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A server that falls silent is given up, one that is asked nothing is not;
how frames are sent together, and what one read of TLS takes."""

import os
import ssl
import sys
import tempfile
import time
import unittest
from unittest import mock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(
    __file__))))

import tarsnap                                              # noqa: E402

# Says who it is, as a far end of ssh does, and then nothing any more.
SILENT = """\
import os, struct, sys, time
sys.path.insert(0, %r)
import tarsnapd
local = tarsnapd.open_local(%r, create=True, transport='stdio')
frame = struct.pack('>IBI', len(local.statement), 128, 0) + local.statement
os.write(1, frame)
while os.read(0, 65536):
    pass
"""


class Silence(unittest.TestCase):

    def setUp(self):
        temp = tempfile.TemporaryDirectory()
        self.addCleanup(temp.cleanup)
        script = os.path.join(temp.name, 'far')
        with open(script, 'w') as file:
            file.write('#!%s\n' % sys.executable + SILENT % (
                os.path.dirname(tarsnap.__file__),
                os.path.join(temp.name, 'store')))
        os.chmod(script, 0o700)
        self.enterPatch(mock.patch.dict(os.environ, TARSNAP_SSH=script))
        self.enterPatch(mock.patch.object(tarsnap, 'SILENCE', 1))
        self.channel = tarsnap.Channel('ssh://nowhere/store')
        self.addCleanup(self.channel.close)
        self.channel.wait_statement()

    def enterPatch(self, patch):
        patch.start()
        self.addCleanup(patch.stop)

    def test_an_answer_that_never_comes(self):
        with self.assertRaisesRegex(tarsnap.ChannelLost, 'No answer from'):
            self.channel.call(tarsnap.STAT)

    def test_nothing_asked(self):
        time.sleep(2)
        self.assertIsNone(self.channel.failed)


class Unhurried(unittest.TestCase):
    """What has no answer is sent with what has one, or once there is enough
    of it; nothing is left behind.
    """

    def setUp(self):
        temp = tempfile.TemporaryDirectory()
        self.addCleanup(temp.cleanup)
        import tarsnapd
        tarsnapd.open_local(temp.name, create=True).close()
        self.channel = tarsnap.Channel(temp.name)
        self.addCleanup(self.channel.close)
        self.channel.wait_statement()
        self.taken = []
        receive = self.channel.link.local.receive

        def noted(kind, rid, body):
            self.taken.append(kind)
            return receive(kind, rid, body)

        self.channel.link.local.receive = noted

    def test_goes_with_a_question(self):
        self.channel.push(tarsnap.PUT, b'x')
        self.assertEqual(len(self.channel.out), 1)
        with self.assertRaises(tarsnap.Refused):
            self.channel.call(tarsnap.STAT)
        self.assertEqual(self.taken, [tarsnap.PUT, tarsnap.STAT])

    def test_goes_when_there_is_enough(self):
        count = tarsnap.UNHURRIED // 1000 + 1
        for _ in range(count):
            self.channel.push(tarsnap.PUT, bytes(1000))
        until = time.monotonic() + 60
        while self.channel.out and time.monotonic() < until:
            time.sleep(0.01)
        self.assertFalse(self.channel.out)

    def test_goes_at_the_end(self):
        self.channel.push(tarsnap.PUT, b'x')
        self.channel.close()
        self.assertEqual(self.taken, [tarsnap.PUT])



class Records(unittest.TestCase):
    """TLS gives a record at a time; a read takes what there is of them."""

    def link(self, *pieces):
        """A TlsLink whose socket gives `pieces`, or raises them."""
        link = tarsnap.TlsLink('127.0.0.1:1', (None, None))
        link.sock = mock.Mock()
        link.sock.recv.side_effect = pieces
        return link

    def test_all_that_has_come(self):
        link = self.link(b'a', b'bc', ssl.SSLWantReadError(),
                         ssl.SSLWantReadError(), b'd', b'', b'')
        self.assertEqual([link.read(9) for _ in range(4)],
                         [b'abc', None, b'd', b''])

    def test_no_more_than_asked_for(self):
        link = self.link(b'abc', b'd', b'e')
        self.assertEqual(link.read(4), b'abcd')
        self.assertEqual([call[0][0] for call in
                          link.sock.recv.call_args_list], [4, 1])

    def test_what_came_before_an_error_is_read(self):
        """Such as why the server hangs up."""
        link = self.link(b'why', ConnectionResetError(), b'')
        self.assertEqual([link.read(9), link.read(9)], [b'why', b''])
        link = self.link(ConnectionResetError())
        with self.assertRaises(ConnectionResetError):
            link.read(9)


if __name__ == '__main__':
    unittest.main()
