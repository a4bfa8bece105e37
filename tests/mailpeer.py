# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A real mail server, aiosmtpd, on a loopback port, that can be cruel.

It comes from PyPI into .venv-mail (installed.py).  `Peer` runs it for a test:
mail it took is in mails(), and plan() says what it does with the next ones:

    ok                  takes it
    rcpt CODE, data CODE, mail CODE
                        answers so, at that place
    drop                hangs up when the first line of the text has come
    took                takes it, and hangs up before it says so
    hang                takes it, and does not say so

The server itself is mailserver.py.
"""

import json
import os
import subprocess
import tempfile

import installed

HERE = os.path.dirname(os.path.abspath(__file__))
PACKAGE = 'aiosmtpd>=1.4.6,<2'
USER, PASSWORD = 'post', 'se cret'


class Peer:
    """A running mail server: port, mails(), plan().

    `cleanup` is an addCleanup or addModuleCleanup of unittest.
    `tls` is starttls, tls or no; with one, `ca` is the certificate to trust
    and a client must log in as USER with PASSWORD.
    """

    def __init__(self, cleanup, tls='no', port=0):
        import s3peers
        self.base = tempfile.TemporaryDirectory()
        cleanup(self.base.cleanup)
        self.root = self.base.name
        self.ca = os.path.join(self.root, 'cert.pem')
        if tls != 'no':
            s3peers.certificate(self.ca)
        python = os.path.join(installed.pip('mail', PACKAGE), 'python3')
        self.child = subprocess.Popen(
            [python, os.path.join(HERE, 'mailserver.py'), self.root, tls,
             str(port), USER, PASSWORD],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL)
        cleanup(self.close)
        self.port = int(self.child.stdout.readline())

    def plan(self, *what):
        with open(os.path.join(self.root, 'plan.new'), 'w') as file:
            json.dump(what, file)
        os.rename(file.name, os.path.join(self.root, 'plan'))

    def mails(self):
        """[{'from', 'to', 'text'}] as they came."""
        found = []
        for name in sorted(os.listdir(self.root)):
            if name.startswith('mail-') and name.endswith('.json'):
                with open(os.path.join(self.root, name)) as file:
                    found.append(json.load(file))
        return found

    def forget(self):
        """What it took, and its plan."""
        for name in os.listdir(self.root):
            if name.startswith(('mail-', 'plan')):
                os.unlink(os.path.join(self.root, name))

    def close(self):
        self.child.stdin.close()
        self.child.stdout.close()
        self.child.kill()
        self.child.wait()
