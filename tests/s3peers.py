#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Two real S3 servers on loopback ports, and a wire that breaks.

    moto    AWS's semantics and signatures, checked against its own IAM
    Swift   OpenStack's object store behind s3api: signatures, body hashes
            and checksums are checked, objects are files

Both come from PyPI into .venv-s3 (installed.py).  `Wire` stands in front of
one of them and does something cruel to chosen requests.  Run as a program it
serves one of them until its standard input ends; its first line of output is
the endpoint, access key and secret key.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request

import installed

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PACKAGES = ['moto[s3,iam]>=5,<6', 'flask', 'flask-cors', 'swift>=2.36',
            'setuptools<81']
REGION = 'us-east-1'
SECONDS = 60                # after which a server will not come any more


def certificate(path):
    """A certificate of localhost and its key, into one PEM file."""
    import datetime
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives import serialization as ser
    from cryptography.hazmat.primitives.asymmetric import ec
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME,
                                         'localhost')])
    start = datetime.datetime(2020, 1, 1)
    cert = x509.CertificateBuilder(
        name, name, key.public_key(), 1, start,
        start + datetime.timedelta(days=36500)).add_extension(
            x509.SubjectAlternativeName([x509.DNSName('localhost')]),
            False).sign(key, hashes.SHA256())
    with open(path, 'wb') as file:
        file.write(cert.public_bytes(ser.Encoding.PEM) + key.private_bytes(
            ser.Encoding.PEM, ser.PrivateFormat.PKCS8, ser.NoEncryption()))


def free_ports(count):
    """Ports of 127.0.0.1 that nobody has."""
    socks = [socket.create_server(('127.0.0.1', 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in socks]
    for sock in socks:
        sock.close()
    return ports


class Peer:
    """A running S3 server: endpoint, access, secret.  A context manager."""

    def __init__(self):
        self.bin = installed.pip('s3', *PACKAGES)
        self.root = tempfile.mkdtemp(prefix='s3-')
        self.processes = []
        self.access = self.secret = ''
        self.port = 0
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def endpoint(self):
        return 'http://127.0.0.1:%d' % self.port

    def spawn(self, *words, **env):
        """One process of it, ended by close()."""
        with open(os.path.join(self.root, 'log'), 'ab') as log:
            self.processes.append(subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                cwd=self.root, env=dict(os.environ, **env)))

    def wait(self, *ports):
        """Until all are listened on."""
        end = time.monotonic() + SECONDS
        for port in ports:
            while True:
                try:
                    socket.create_connection(('127.0.0.1', port)).close()
                    break
                except OSError:
                    if time.monotonic() > end or any(
                            p.poll() is not None for p in self.processes):
                        raise AssertionError(
                            'no S3 server: ' + self.log()) from None
                    time.sleep(0.05)

    def log(self):
        with open(os.path.join(self.root, 'log'), errors='replace') as file:
            return file.read()[-3000:]

    def environment(self, port=None):
        """What a program needs to use it, through `port` of a Wire."""
        return {'AWS_ACCESS_KEY_ID': self.access,
                'AWS_SECRET_ACCESS_KEY': self.secret,
                'AWS_ENDPOINT_URL_S3': 'http://127.0.0.1:%d' % (
                    port or self.port),
                'AWS_REGION': REGION, 'AWS_EC2_METADATA_DISABLED': 'true'}

    def close(self):
        for process in self.processes:
            process.kill()
            process.wait()
        shutil.rmtree(self.root, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Moto(Peer):
    """Every request must be signed by a user of its IAM."""

    def start(self):
        self.port, = free_ports(1)
        self.spawn(os.path.join(self.bin, 'moto_server'), '-H', '127.0.0.1',
                   '-p', str(self.port), INITIAL_NO_AUTH_ACTION_COUNT='6')
        self.wait(self.port)
        self.access, self.secret = self.user('tester', 's3:*')
        self.reader = self.user('reader', 's3:Get*', 's3:List*')

    def user(self, name, *actions):
        """(access, secret) of a new user who may do `actions`."""
        policy = {'Version': '2012-10-17', 'Statement': [
            {'Effect': 'Allow', 'Action': actions, 'Resource': '*'}]}
        self.iam(Action='CreateUser', UserName=name)
        self.iam(Action='PutUserPolicy', UserName=name, PolicyName='all',
                 PolicyDocument=json.dumps(policy))
        answer = self.iam(Action='CreateAccessKey', UserName=name)
        return [re.search('<%s>(.*)</%s>' % (field, field), answer)[1]
                for field in ('AccessKeyId', 'SecretAccessKey')]

    def iam(self, **form):
        """One of the six calls it takes unsigned."""
        with urllib.request.urlopen(urllib.request.Request(
                self.endpoint, urllib.parse.urlencode(
                    dict(form, Version='2010-05-08')).encode(),
                {'Host': 'iam.amazonaws.com', 'Authorization':
                 'AWS4-HMAC-SHA256 Credential=x/20200101/us-east-1/iam/'
                 'aws4_request, SignedHeaders=host, Signature=0'})) as answer:
            return answer.read().decode()


class OpenMoto(Peer):
    """Anybody may do anything; no signature is looked at."""

    def start(self):
        self.port, = free_ports(1)
        self.access = self.secret = 'any'
        self.spawn(os.path.join(self.bin, 'moto_server'), '-H', '127.0.0.1',
                   '-p', str(self.port))
        self.wait(self.port)


@contextlib.contextmanager
def bucket(name):
    """An OpenMoto with that bucket, and the environment that leads there."""
    import tarsnapd
    from test_s3_store import environment
    with OpenMoto() as peer, environment(peer.environment()):
        tarsnapd.Bucket(name, {}).request('create', '', 'PUT')
        yield peer


SWIFT_CONF = '''\
[swift-hash]
swift_hash_path_suffix = suffix
swift_hash_path_prefix = prefix
[storage-policy:0]
name = all
default = yes
'''

SWIFT_SERVER = '''\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = %(port)d
workers = 0
user = %(user)s
swift_dir = %(root)s
devices = %(root)s/devices
mount_check = false
fallocate_reserve = 0
log_level = ERROR
disable_fallocate = true
'''

SWIFT_BACKEND = '''\
[pipeline:main]
pipeline = %(kind)s-server
[app:%(kind)s-server]
use = egg:swift#%(kind)s
'''

SWIFT_PROXY = '''\
[pipeline:main]
pipeline = catch_errors gatekeeper cache listing_formats s3api tempauth copy \
slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:%(nobody)d
''' + ''.join('[filter:%s]\nuse = egg:swift#%s\n' % (name, name) for name in (
    'catch_errors', 'gatekeeper', 'listing_formats', 'copy', 'slo', 'dlo'))


class Swift(Peer):
    """Account, container, object and proxy server, one device."""

    def start(self):
        import getpass
        self.access, self.secret = 'test:tester', 'testing'
        kinds = ('account', 'container', 'object', 'proxy')
        *ports, nobody = free_ports(5)
        self.port = ports[3]
        os.makedirs(os.path.join(self.root, 'devices', 'sda1'))
        self.write('swift.conf', SWIFT_CONF)
        for kind, port in zip(kinds, ports):
            values = {'port': port, 'user': getpass.getuser(), 'kind': kind,
                      'root': self.root, 'nobody': nobody}
            self.write(kind + '.conf', (SWIFT_SERVER + (
                SWIFT_PROXY if kind == 'proxy' else SWIFT_BACKEND)) % values)
            if kind != 'proxy':
                self.ring(kind, port)
        for kind in kinds:
            self.spawn(os.path.join(self.bin, 'swift-%s-server' % kind),
                       os.path.join(self.root, kind + '.conf'))
        self.wait(*ports)

    def write(self, name, text):
        with open(os.path.join(self.root, name), 'w') as file:
            file.write(text)

    def ring(self, kind, port):
        builder = [os.path.join(self.bin, 'python'),
                   os.path.join(self.bin, 'swift-ring-builder'),
                   kind + '.builder']
        for words in (['create', '4', '1', '0'],
                      ['add', '--region', '1', '--zone', '1', '--ip',
                       '127.0.0.1', '--port', str(port), '--device', 'sda1',
                       '--weight', '1'], ['rebalance']):
            subprocess.run(builder + words, cwd=self.root, check=True,
                           stdout=subprocess.DEVNULL,
                           env=dict(os.environ, SWIFT_CONF_DIR=self.root))


class Wire:
    """A loopback port in front of a Peer, for HTTP/1.1 with lengths.

    `plan(number, method, path)` says what becomes of each request, counted
    from 1: None to pass it on, or one of

        '500' 'slow' '409'  an answer of that kind, without asking the peer
        'hang'          no answer, the connection stays open
        'reset'         the connection ends before the request is passed on
        'lost'          the peer does it, its answer is thrown away
        'torn'          half of the answer's body, then the end
        'empty'         200 and an XML document that is no list
        'flip'          a bit of the answer's body is another one
        'unconditional' the peer never sees If-None-Match
        'whole'         the peer never sees Range
        'bye'           all is well, but then the connection ends

    It closes with the test.  With `tls`, a server's SSLContext, clients must
    come over TLS.
    """

    def __init__(self, case, peer, plan=None, tls=None):
        self.peer = peer
        self.tls = tls
        self.plan = plan or (lambda *_: None)
        self.count = 0
        self.seen = []              # (method, path, what was done)
        self.connections = 0
        self.lock = threading.Lock()
        self.putting = None         # a Lock: puts are passed on one by one
        self.listener = socket.create_server(('127.0.0.1', 0))
        self.port = self.listener.getsockname()[1]
        self.hung = []
        case.addCleanup(self.close)
        threading.Thread(target=self.run, daemon=True).start()

    def close(self):
        self.listener.close()
        for sock in self.hung:
            sock.close()

    def run(self):
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self.serve, args=(sock,),
                             daemon=True).start()

    def serve(self, sock):
        """One connection, until either side ends it."""
        peer = socket.create_connection(('127.0.0.1', self.peer.port))
        try:
            if self.tls:
                sock = self.tls.wrap_socket(sock, server_side=True)
            with sock, peer, sock.makefile('rb') as client, \
                    peer.makefile('rb') as server:
                while self.one(sock, client, peer, server):
                    pass
        except OSError:
            pass

    def one(self, sock, client, peer, server):
        """One request and its answer; False at the end."""
        head, body = self.message(client)
        if not head:
            return False
        method, path = head.split(b' ')[:2]
        with self.lock:
            self.count += 1
            what = self.plan(self.count, method.decode(), path.decode())
            self.seen.append((method.decode(), path.decode(), what))
        if what == 'hang':
            self.hung.append(sock.dup())
            time.sleep(SECONDS)
            return False
        if what == 'reset':
            return False
        if what in ('500', 'slow', '409'):
            sock.sendall(self.refusal(what))
            return True
        if what == 'empty':
            sock.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n'
                         b'<Error/>')
            return True
        hidden = {'unconditional': b'If-None-Match:', 'whole': b'Range:'}
        if what in hidden:      # signed, so only for one that does not look
            head = head.replace(hidden[what], b'X-' + hidden[what])
        turn = self.putting if method == b'PUT' else None
        with turn or contextlib.nullcontext():
            peer.sendall(head + body)
            head, body = self.message(server, method == b'HEAD')
        if what == 'lost':
            return False
        if what == 'torn':
            sock.sendall(head + body[:len(body) // 2])
            return False
        if what == 'flip' and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        sock.sendall(head + body)
        return bool(head) and what != 'bye'

    @staticmethod
    def message(file, bare=False):
        """(head, body) of the next message, empty at the end."""
        head, length = b'', 0
        while True:
            line = file.readline()
            if not line:
                return b'', b''
            head += line
            name, _, value = line.partition(b':')
            if name.lower() == b'content-length':
                length = int(value)
            if line == b'\r\n':
                return head, b'' if bare else file.read(length)

    @staticmethod
    def refusal(what):
        status, code = {'500': ('500 Internal Server Error', 'InternalError'),
                        'slow': ('503 Slow Down', 'SlowDown'),
                        '409': ('409 Conflict',
                                'ConditionalRequestConflict')}[what]
        body = '<Error><Code>%s</Code><Message>not now</Message></Error>' % (
            code)
        return ('HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s' % (
            status, len(body), body)).encode()


def main():
    kind = {'moto': Moto, 'swift': Swift}[sys.argv[1]]
    with kind() as peer:
        print(peer.endpoint, peer.access, peer.secret, flush=True)
        sys.stdin.read()


if __name__ == '__main__':
    main()
