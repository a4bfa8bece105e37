# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Two Twilios on loopback ports: a real stand-in, and one that is cruel.

`Emulate` runs emulate, a server that behaves as services' APIs do, and `Peer`
its Twilio: messages(), calls(), reply().

`Cruel` is a server of a few lines.  It takes messages and calls as Twilio
does, and plan() says what it does with the next requests that make one:

    ok                  takes it
    CODE [ERROR]        answers so, with Twilio's error number
    drop                hangs up before it has done anything
    took [SECONDS]      takes it, and hangs up before it says so; it is
                        not listed before that

`Cgi` runs alarm.cgi for them.
"""

import base64
import hashlib
import hmac
import http.server
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import installed

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)

ACCOUNT, TOKEN = 'AC' + '12' * 16, 'to ken'
NUMBER = '+15005550006'

# It would listen everywhere, and at a port that is known before.
LISTEN = '''
import net from 'node:net';
const listen = net.Server.prototype.listen;
net.Server.prototype.listen = function () {
    this.once('listening', () => console.log('PORT ' + this.address().port));
    return listen.call(this, {port: 0, host: '127.0.0.1'});
};
'''


class Emulate:
    """A running emulate of one service: port, close().

    `seed` is what its configuration says of the service; `cleanup` is an
    addCleanup or addModuleCleanup of unittest.
    """

    def __init__(self, cleanup, service, seed):
        program = installed.emulate()
        with tempfile.NamedTemporaryFile('w', suffix='.yaml') as file:
            json.dump({service: seed}, file)    # which is YAML, too
            file.flush()
            self.child = subprocess.Popen(
                ['node', '--import', 'data:text/javascript,'
                 + urllib.parse.quote(LISTEN), program, 'start',
                 '-s', service, '-p', '4000', '--seed', file.name],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True)
            cleanup(self.close)
            self.port = 0
            for line in self.child.stdout:
                if line.startswith('PORT '):
                    self.port = int(line.split()[1])
                    break
        if not self.port:
            raise RuntimeError('emulate does not start')

    def close(self):
        self.child.kill()
        self.child.wait()
        self.child.stdout.close()


def signature(url, form, token=TOKEN):
    """What X-Twilio-Signature is for a form, written from its definition."""
    text = url + ''.join(name + value for name, value in sorted(set(form)))
    return base64.b64encode(hmac.digest(
        token.encode(), text.encode(), hashlib.sha1)).decode()


class Peer(Emulate):
    """emulate's Twilio, with one number, whose mail goes to `sms_url`."""

    def __init__(self, cleanup, sms_url=None):
        number = {'phone_number': NUMBER}
        if sms_url:
            number['sms_url'] = sms_url
        super().__init__(cleanup, 'twilio', {
            'account': {'sid': ACCOUNT, 'auth_token': TOKEN},
            'phone_numbers': [number]})
        self.url = 'http://127.0.0.1:%d' % self.port

    def ask(self, path, form=None):
        """An answer of its API, to GET or to the POST of a form."""
        request = urllib.request.Request(
            self.url + path,
            None if form is None else urllib.parse.urlencode(form).encode(),
            {'Authorization': 'Basic ' + base64.b64encode(
                ('%s:%s' % (ACCOUNT, TOKEN)).encode()).decode()})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def outgoing(self, kind):
        """Those of 'Messages' or 'Calls' that left, in their order."""
        found = self.ask('/2010-04-01/Accounts/%s/%s.json?PageSize=1000' % (
            ACCOUNT, kind))[kind.lower()]
        return [one for one in reversed(found)
                if one['direction'] == 'outbound-api']

    def messages(self):
        return self.outgoing('Messages')

    def calls(self):
        return self.outgoing('Calls')

    def reply(self, sender, text):
        """Somebody sends a message to the number; it goes to sms_url."""
        self.ask('/_twilio/simulate/inbound-message',
                 {'From': sender, 'To': NUMBER, 'Body': text})

    def status(self, kind, sid, status):
        """'message' or 'call' `sid` has come to this; who asked is told."""
        name = {'message': 'MessageSid', 'call': 'CallSid'}[kind]
        self.ask('/_twilio/simulate/%s-status' % kind,
                 {name: sid, 'Status': status})

    def clear(self):
        """Forget messages and calls."""
        for kind in ('Messages', 'Calls'):
            for one in self.outgoing(kind):
                request = urllib.request.Request(
                    '%s/2010-04-01/Accounts/%s/%s/%s.json' % (
                        self.url, ACCOUNT, kind, one['sid']),
                    method='DELETE', headers={
                        'Authorization': 'Basic ' + base64.b64encode(
                            ('%s:%s' % (ACCOUNT, TOKEN)).encode()).decode()})
                urllib.request.urlopen(request).close()


class CruelAnswers(http.server.BaseHTTPRequestHandler):
    """What a Cruel, `server.cruel`, says to a request."""

    def log_message(self, *words):
        pass

    def do_GET(self):
        cruel = self.server.cruel
        cruel.asked.append(('GET', self.path))
        path = urllib.parse.urlsplit(self.path)
        kind = path.path.rpartition('/')[2].partition('.')[0]
        to = urllib.parse.parse_qs(path.query).get('To', [None])[0]
        self.say(200, {kind.lower(): [
            one for one in reversed(cruel.made)
            if one['kind'] == kind and to in (None, one['to'])
            and cruel.clock() >= one['listed']]})

    def do_POST(self):
        cruel = self.server.cruel
        cruel.asked.append(('POST', self.path))
        form = dict(urllib.parse.parse_qsl(self.rfile.read(int(
            self.headers['Content-Length'])).decode()))
        with cruel.lock:
            what = cruel.planned.pop(0) if cruel.planned else 'ok'
        word, _, number = what.partition(' ')
        if word.isdigit():
            self.say(int(word), {
                'code': int(number or 20001), 'status': int(word),
                'message': 'as planned'})
        elif word != 'drop' and 'To' in form:
            with cruel.lock:
                one = cruel.take(self.path, form, float(number or 0))
            if word == 'ok':
                self.say(201, one)

    def say(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        if status == 302:
            self.send_header('Location',
                             self.server.cruel.url + '/elsewhere')
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class CruelServer(http.server.ThreadingHTTPServer):
    """The server of a Cruel; counts its requests, begun and done."""

    def __init__(self, cruel):
        self.cruel = cruel
        self.begun = self.done = 0
        super().__init__(('127.0.0.1', 0), CruelAnswers)

    def process_request(self, *words):
        self.begun += 1
        super().process_request(*words)

    def process_request_thread(self, *words):
        super().process_request_thread(*words)
        with self.cruel.lock:
            self.done += 1


class Cruel:
    """The other one: url, made (what it took, with `kind`), plan()."""

    def __init__(self, cleanup):
        self.made = []
        self.planned = []
        self.asked = []         # (method, path) of each request
        self.clock = time.time
        self.lock = threading.Lock()
        self.server = CruelServer(self)
        self.url = 'http://127.0.0.1:%d' % self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever,
                                       kwargs={'poll_interval': 0.02})
        self.thread.start()
        cleanup(self.close)

    def wait(self):
        """Return when all that was sent to it by now has been heard."""
        urllib.request.urlopen(self.url + '/Wait.json').close()
        while self.server.done < self.server.begun:
            time.sleep(0.005)

    def take(self, path, form, seconds):
        kind = path.rpartition('/')[2].partition('.')[0]
        sid = ('SM' if kind == 'Messages' else 'CA') + os.urandom(16).hex()
        now = time.strftime('%a, %d %b %Y %H:%M:%S +0000', time.gmtime(
            self.clock()))
        one = {'kind': kind, 'sid': sid, 'to': form['To'],
               'from': form['From'], 'body': form.get('Body'),
               'twiml': form.get('Twiml'), 'direction': 'outbound-api',
               'date_created': now, 'status': 'queued',
               'listed': self.clock() + seconds}
        self.made.append(one)
        return one

    def plan(self, *what):
        self.planned[:] = what

    def forget(self):
        self.made[:], self.planned[:], self.asked[:] = [], [], []

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


class Cgi:
    """A web server that runs alarm.cgi: url, and `environment` for it."""

    def __init__(self, cleanup):
        self.environment = {}
        cgi = self

        class Handler(http.server.BaseHTTPRequestHandler):

            def log_message(self, *words):
                pass

            def do_POST(self):
                length = int(self.headers.get('Content-Length') or 0)
                done = subprocess.run(
                    [sys.executable, os.path.join(ROOT, 'cgi-bin',
                                                  'alarm.cgi')],
                    input=self.rfile.read(length), stdout=subprocess.PIPE,
                    check=False, env=dict(
                        cgi.environment, GATEWAY_INTERFACE='CGI/1.1',
                        REQUEST_METHOD=self.command,
                        QUERY_STRING=self.path.partition('?')[2],
                        CONTENT_LENGTH=str(length),
                        CONTENT_TYPE=self.headers.get('Content-Type', ''),
                        HTTP_X_TWILIO_SIGNATURE=self.headers.get(
                            'X-Twilio-Signature', '')))
                head, _, body = done.stdout.partition(b'\n\n')
                lines = dict(line.split(': ', 1)
                             for line in head.decode().split('\n'))
                self.send_response(int(lines.pop('Status', '500')[:3]))
                for header in lines.items():
                    self.send_header(*header)
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST

        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0),
                                                      Handler)
        self.url = 'http://127.0.0.1:%d/alarm.cgi' % self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever,
                                       kwargs={'poll_interval': 0.02})
        self.thread.start()
        cleanup(self.close)

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
