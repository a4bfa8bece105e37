#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The mail server of mailpeer.py, for the environment that has aiosmtpd.

usage: mailserver.py DIR starttls|tls|no PORT USER PASSWORD

It prints its port, puts each mail into DIR/mail-N.json, takes what to do with
each from the list in DIR/plan, and ends with its standard input.
"""

import asyncio
import json
import os
import ssl
import sys

from aiosmtpd.smtp import SMTP, AuthResult


class Cruel(SMTP):
    """A server that does what is planned."""

    def __init__(self, root, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.root = root
        self.what = 'ok'        # the plan for the mail that is coming

    def take_plan(self):
        file = os.path.join(self.root, 'plan')
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
    """Keeps what comes."""

    def __init__(self, root):
        self.root = root
        self.count = 0

    async def handle_DATA(self, server, session, envelope):
        if server.what.startswith('data'):
            return server.what[5:] + ' not this'
        self.count += 1
        file = os.path.join(self.root, 'mail-%06d' % self.count)
        with open(file, 'w') as out:
            json.dump({'from': envelope.mail_from, 'to': envelope.rcpt_tos,
                       'text': envelope.content.decode('latin-1')}, out)
        os.rename(file, file + '.json')
        if server.what == 'hang':
            await asyncio.sleep(3600)
        if server.what == 'took':
            server.transport.abort()
        return '250 taken'


async def serve(root, tls, port, user, password):
    def login(server, session, envelope, mechanism, data):
        return AuthResult(success=(data.login, data.password) == (
            user.encode(), password.encode()), handled=False)

    def factory():
        return Cruel(root, handler, hostname='localhost',
                     authenticator=login,
                     tls_context=context if tls == 'starttls' else None,
                     require_starttls=tls == 'starttls',
                     auth_required=tls != 'no',
                     auth_require_tls=tls == 'starttls')

    handler, context = Handler(root), None
    if tls != 'no':
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(os.path.join(root, 'cert.pem'))
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        factory, '127.0.0.1', int(port), ssl=context if tls == 'tls' else None)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    os._exit(0)


if __name__ == '__main__':
    asyncio.run(serve(*sys.argv[1:]))
