# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A server that falls silent is given up; one that is asked nothing is not."""

import os
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


if __name__ == '__main__':
    unittest.main()
