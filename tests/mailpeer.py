#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A real mail server, aiosmtpd, on a loopback port, that can be cruel.

It comes from PyPI into a virtual environment, .venv-mail beside the sources,
which is made when first asked for.  `Peer` runs it for a test: mail it took
is in mails(), and plan() says what it does with the next ones:

    ok                  takes it
    rcpt CODE, data CODE, mail CODE
                        answers so, at that place
    drop                hangs up when the first line of the text has come
    took                takes it, and hangs up before it says so
    hang                takes it, and does not say so

Run as a program, by the interpreter of that environment, it is the server.
"""

import json
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(os.path.dirname(HERE), '.venv-mail')
PACKAGES = ['aiosmtpd>=1.4.6,<2']
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
        python = os.path.join(s3peers.venv(VENV, PACKAGES), 'python3')
        self.child = subprocess.Popen(
            [python, os.path.abspath(__file__), self.root, tls, str(port)],
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


def main(root, tls, port):
    import asyncio
    import ssl
    from aiosmtpd.smtp import SMTP, AuthResult

    class Cruel(SMTP):
        """The server, with its plan."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.what = 'ok'

        def take_plan(self):
            file = os.path.join(root, 'plan')
            try:
                with open(file) as plan:
                    steps = json.load(plan)
            except FileNotFoundError:
                steps = []
            self.what = steps.pop(0) if steps else 'ok'
            with open(file + '.new', 'w') as plan:
                json.dump(steps, plan)
            os.rename(file + '.new', file)

        async def smtp_MAIL(self, arg):
            self.take_plan()
            if self.what.startswith('mail'):
                await self.push(self.what[5:] + ' not you')
            else:
                await super().smtp_MAIL(arg)

        async def smtp_RCPT(self, arg):
            if self.what.startswith('rcpt'):
                await self.push(self.what[5:] + ' not there')
            else:
                await super().smtp_RCPT(arg)

        async def smtp_DATA(self, arg):
            if self.what == 'drop':
                await self.push('354 go on')
                await self._reader.readline()
                self.transport.abort()
            else:
                await super().smtp_DATA(arg)

    class Handler:
        count = 0

        async def handle_DATA(self, server, session, envelope):
            if server.what.startswith('data'):
                return server.what[5:] + ' not this'
            Handler.count += 1
            file = os.path.join(root, 'mail-%06d' % Handler.count)
            with open(file, 'w') as out:
                json.dump({'from': envelope.mail_from,
                           'to': envelope.rcpt_tos,
                           'text': envelope.content.decode('latin-1')}, out)
            os.rename(file, file + '.json')
            if server.what == 'hang':
                await asyncio.sleep(3600)
            if server.what == 'took':
                server.transport.abort()
            return '250 taken'

    def login(server, session, envelope, mechanism, data):
        return AuthResult(success=(data.login, data.password) == (
            USER.encode(), PASSWORD.encode()), handled=False)

    context = None
    if tls != 'no':
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(os.path.join(root, 'cert.pem'))

    def factory():
        return Cruel(Handler(), hostname='localhost', authenticator=login,
                     tls_context=context if tls == 'starttls' else None,
                     require_starttls=tls == 'starttls',
                     auth_required=tls != 'no',
                     auth_require_tls=tls == 'starttls')

    async def serve():
        server = await asyncio.get_running_loop().create_server(
            factory, '127.0.0.1', port,
            ssl=context if tls == 'tls' else None)
        print(server.sockets[0].getsockname()[1], flush=True)
        await asyncio.get_running_loop().run_in_executor(
            None, sys.stdin.read)
        os._exit(0)

    asyncio.run(serve())


if __name__ == '__main__':
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
