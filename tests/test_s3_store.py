# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The store on S3: signatures, the five verbs, and a wire that breaks.

Against two real servers, moto and OpenStack Swift.
"""

import hashlib
import http.server
import json
import os
import socket
import ssl
import tempfile
import threading
import time
import unittest
from unittest import mock

import s3peers
from rawclient import tarsnapd
from s3peers import Wire

PEERS = {}
STRICT = ('moto', 'swift')
EXAMPLE = tarsnapd.Credentials('AKIAIOSFODNN7EXAMPLE',
                               'wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY',
                               None, None)


def setUpModule():
    unittest.addModuleCleanup(lambda: [p.close() for p in PEERS.values()])
    PEERS['moto'] = s3peers.Moto()
    PEERS['swift'] = s3peers.Swift()
    PEERS['open'] = s3peers.OpenMoto()
    for name in PEERS:
        with environment(PEERS[name].environment()):
            tarsnapd.Bucket('backup', {}).request('create', '', 'PUT')


def environment(values):
    """Nothing of AWS in the environment but `values`."""
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith('AWS_')}
    return mock.patch.dict(os.environ, dict(kept, HOME='/nonexistent',
                                            **values), clear=True)


class Case(unittest.TestCase):

    numbers = iter(range(10 ** 6))

    def store(self, peer='moto', plan=None, **conf):
        """A store of its own on a peer, through a Wire if there is a plan."""
        environ = PEERS[peer].environment()
        if plan:
            self.wire = Wire(self, PEERS[peer], plan)
            environ = PEERS[peer].environment(self.wire.port)
        context = environment(environ)
        context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        store = tarsnapd.S3Store('s3://backup/%s-%d' % (
            self.id(), next(self.numbers)), conf)
        self.addCleanup(store.close)
        return store

    def limits(self, **values):
        """Other numbers than those of the program, for a test."""
        names = {name.replace('_', ' '): value
                 for name, value in values.items()}
        self.enter(mock.patch.dict(tarsnapd.S3_LIMIT, names))

    def enter(self, context):
        context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)

    def fails(self, kind, call, *says):
        with self.assertRaises(kind) as caught:
            call()
        for text in says:
            self.assertIn(text, str(caught.exception))
        self.assertNotIn('\n', str(caught.exception))


class Signatures(Case):
    """The examples of AWS's "Transferring Payload in a Single Chunk"."""

    HELLO = hashlib.sha256(b'Welcome to Amazon S3.').hexdigest()
    NONE = hashlib.sha256(b'').hexdigest()
    TABLE = [
        ('GET object', 'GET', '/test.txt', [], NONE,
         {'Range': 'bytes=0-9'},
         'f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41'),
        ('PUT object', 'PUT', '/test%24file.text', [], HELLO,
         {'Date': 'Fri, 24 May 2013 00:00:00 GMT',
          'x-amz-storage-class': 'REDUCED_REDUNDANCY'},
         '98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd'),
        ('GET lifecycle', 'GET', '/', [('lifecycle', '')], NONE, {},
         'fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543'),
        ('list objects', 'GET', '/', [('prefix', 'J'), ('max-keys', '2')],
         NONE, {},
         '34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7'),
    ]

    def test_published_vectors(self):
        for name, method, path, query, digest, headers, wanted in self.TABLE:
            with self.subTest(name):
                headers = dict(headers, **{
                    'Host': 'examplebucket.s3.amazonaws.com',
                    'X-Amz-Date': '20130524T000000Z',
                    'X-Amz-Content-Sha256': digest})
                made = tarsnapd.sign_request(
                    EXAMPLE, 'us-east-1', '20130524T000000Z', method, path,
                    tarsnapd.query_string(query), headers)
                self.assertEqual(made.rpartition('Signature=')[2], wanted)
                self.assertIn('Credential=AKIAIOSFODNN7EXAMPLE/20130524/'
                              'us-east-1/s3/aws4_request', made)

    def test_a_session_token_is_signed(self):
        bucket = tarsnapd.Bucket('b', {
            's3-access-key': 'A', 's3-secret-key': 'S',
            's3-session-token': 'T', 's3-endpoint': 'http://h:9'})
        headers, target = bucket._signed('read', 'GET', 'a key', (), {
            'Range': 'bytes=0-1'}, b'', tarsnapd.DIGEST_OF_NONE)
        self.assertEqual((target, headers['Host'],
                          headers['X-Amz-Security-Token']),
                         ('/b/a%20key', 'h:9', 'T'))
        self.assertIn('SignedHeaders=host;range;x-amz-content-sha256;'
                      'x-amz-date;x-amz-security-token,',
                      headers['Authorization'])

    def test_path_is_encoded_once(self):
        self.assertEqual(tarsnapd.percent('a/./b//c +&=%~*(\u00e9', '/'),
                         'a/./b//c%20%2B%26%3D%25~%2A%28%C3%A9')


class Verbs(Case):
    """What FileStore promises, on both servers."""

    def test_five_verbs(self):
        for peer in STRICT:
            with self.subTest(peer):
                self.verbs(self.store(peer))

    def verbs(self, store):
        store.prepare()
        store.prepare()         # also when it was tried before
        self.assertTrue(store.put('a/1', b'first'))
        self.assertFalse(store.put('a/1', b'other'))
        self.assertEqual(store.get('a/1'), b'first')
        self.assertEqual(store.get('a/1', 1, 3), b'irs')
        self.assertEqual(store.get('a/1', 3), b'st')
        self.assertEqual(store.get('a/1', 2, 0), b'')
        self.assertEqual((store.size('a/1'), store.size('a/2')), (5, None))
        self.fails(tarsnapd.NoObject, lambda: store.get('a/2'), 'a/2')
        for offset, length in ((3, 4), (9, 1)):
            self.fails(tarsnapd.Damaged,
                       lambda: store.get('a/1', offset, length), 'short read')
        self.assertTrue(store.put('a/empty', b''))
        self.assertEqual(store.get('a/empty'), b'')
        with tempfile.NamedTemporaryFile() as file:
            data = os.urandom(3 << 20)
            file.write(data)
            file.flush()
            self.assertTrue(store.put('seg/1', file.name))
            self.assertFalse(store.put('seg/1', file.name))
            self.assertTrue(os.path.exists(file.name))
        self.assertEqual(store.get('seg/1'), data)
        store.delete('a/1')
        store.delete('a/1')
        self.assertEqual(store.size('a/1'), None)
        self.assertTrue(store.put('a/1', b'again'))
        self.assertEqual(store.list('a/'), ['a/1', 'a/empty'])

    def test_list_of_many_pages_and_odd_names(self):
        self.limits(keys_at_once=7)
        odd = 'o/\u00fcb er+&=%25#~*()\'"<>'
        for peer in STRICT:
            with self.subTest(peer):
                store = self.store(peer)
                keys = sorted(['k/%02d' % i for i in range(22)] + ['kk', odd])
                for key in reversed(keys):
                    store.put(key, key.encode())
                self.assertEqual(store.list(''), keys)
                self.assertEqual(store.list('k/'), keys[:22])
                self.assertEqual(store.list('k/1'), keys[10:20])
                self.assertEqual(store.list('none/'), [])
                self.assertEqual(store.get(odd), odd.encode())

    def test_one_of_many_at_once_wins_in_a_server_directory(self):
        # On Swift that takes more than If-None-Match; processes and threads.
        with tempfile.TemporaryDirectory() as base:
            for peer in STRICT:
                store = self.store(peer)
                store.turns = os.path.join(base, 'turn')
                children = []
                for one in range(2):
                    pid = os.fork()
                    if pid == 0:
                        os._exit(self.wins(store))
                    children.append(pid)
                won = self.wins(store) + sum(
                    os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    for pid in children)
                self.assertEqual(won, 12, peer)

    @staticmethod
    def wins(store):
        """How often one of two threads made one of twelve objects."""
        won = []
        for n in range(12):
            threads = [threading.Thread(target=lambda i=i: won.append(
                store.put('k%d' % n, b'%d %d' % (i, os.getpid()))))
                for i in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return sum(won)

    def test_a_prefix_is_a_place_of_its_own(self):
        store, other = self.store(), self.store()
        store.put('x', b'mine')
        self.assertEqual(other.list(''), [])
        self.assertTrue(other.put('x', b'theirs'))
        self.assertEqual(store.get('x'), b'mine')

    def test_refusals_name_bucket_key_status_and_code(self):
        for peer in STRICT:
            with self.subTest(peer):
                store = self.store(peer)
                place = 's3://backup/' + store.prefix
                os.environ['AWS_SECRET_ACCESS_KEY'] = 'wrong'
                self.fails(tarsnapd.StoreError, lambda: store.put('k', b''),
                           'write ' + place + 'k: 403 SignatureDoesNotMatch')
                os.environ['AWS_SECRET_ACCESS_KEY'] = PEERS[peer].secret
                none = tarsnapd.S3Store('s3://nosuchbucket', {})
                for call in (lambda: none.get('k'), lambda: none.list(''),
                             lambda: none.put('k', b''),
                             lambda: none.delete('k')):
                    self.fails(tarsnapd.StoreError, call, 's3://nosuchbucket/',
                               '404 NoSuchBucket')

    def test_a_refusal_in_the_middle_of_a_segment(self):
        self.limits(attempts=1)
        with tempfile.NamedTemporaryFile() as file:
            file.truncate(20 << 20)
            for peer in STRICT:
                with self.subTest(peer):
                    store = self.store(peer)
                    os.environ['AWS_SECRET_ACCESS_KEY'] = 'wrong'
                    self.fails(tarsnapd.StoreError,
                               lambda: store.put('k', file.name),
                               '403 SignatureDoesNotMatch')

    def test_swift_checks_what_is_signed(self):
        store = self.store('swift')
        bucket = store.bucket
        self.limits(attempts=1)
        for name, headers, digest in (
                ('body', {}, tarsnapd.sha256(b'another')),
                ('checksum', {'x-amz-checksum-sha256': 'A' * 43 + '='},
                 tarsnapd.sha256(b'body'))):
            with self.subTest(name):
                self.fails(tarsnapd.StoreError, lambda: bucket.request(
                    'write', store.prefix + 'k', 'PUT', headers=headers,
                    body=b'body', digest=digest), ': 400 ')
        self.assertEqual(store.size('k'), None)

    def test_region_and_time_are_learnt_from_a_refusal(self):
        store = self.store('swift', **{'s3-region': 'eu-west-9'})
        self.assertTrue(store.put('k', b''))
        self.assertEqual(store.bucket.region, 'us-east-1')
        store.bucket.skew = -7200
        self.assertTrue(store.put('l', b''))
        self.assertLess(abs(store.bucket.skew), 60)


class Faults(Case):
    """The n-th request fails, for every n of a small history."""

    def setUp(self):
        self.limits(first_delay=0.001, first_delay_if_slow=0.001)

    def history(self, store):
        """Every verb, with what must come of it whatever the wire does."""
        self.assertIs(store.put('a/1', b'first'), True)
        self.assertIs(store.put('a/1', b'other'), False)
        self.assertEqual(store.get('a/1'), b'first')
        self.assertEqual(store.get('a/1', 1, 3), b'irs')
        self.assertEqual(store.size('a/1'), 5)
        self.assertIs(store.put('a/2', b'second'), True)
        self.assertEqual(store.list('a/'), ['a/1', 'a/2'])
        store.delete('a/2')
        self.assertEqual(store.size('a/2'), None)
        self.fails(tarsnapd.NoObject, lambda: store.get('a/2'))

    def test_every_fault_at_every_request(self):
        store = self.store('swift', plan=lambda *_: None)
        self.history(store)
        requests = self.wire.count
        self.assertEqual(requests, 10)
        self.assertEqual(self.wire.connections, 1)      # it is kept
        for what, peer in (
                ('500', 'moto'), ('409', 'moto'), ('slow', 'moto'),
                ('reset', 'moto'), ('hang', 'moto'), ('lost', 'swift'),
                ('torn', 'swift')):
            self.limits(silence=0.4 if what == 'hang' else 20)
            for n in range(1, requests + 1):
                with self.subTest(what, n=n):
                    store = self.store(peer, plan=lambda number, *_:
                                       what if number == n else None)
                    self.history(store)
                    self.assertGreaterEqual(self.wire.count, requests)

    def test_it_is_given_up_at_last(self):
        for what, says in (('500', '500 InternalError: not now'),
                           ('slow', '503 SlowDown: not now'),
                           ('reset', '127.0.0.1: '), ('lost', '127.0.0.1: ')):
            with self.subTest(what):
                store = self.store(plan=lambda *_: what)
                self.fails(tarsnapd.StoreError,
                           lambda: store.put('k', b''), 'write s3://backup/',
                           says, '(tried 6 times)')
                self.assertEqual(self.wire.count, 6)

    def test_what_cannot_help_is_not_tried_again(self):
        store = self.store(plan=lambda *_: None)
        os.environ['AWS_SECRET_ACCESS_KEY'] = 'wrong'
        self.fails(tarsnapd.StoreError, lambda: store.put('k', b''), '403')
        self.assertEqual(self.wire.count, 1)

    def test_repetitions_are_limited_over_all_requests(self):
        self.limits(tokens=20)
        store = self.store(plan=lambda *_: '500')
        for _ in range(10):
            self.fails(tarsnapd.StoreError, lambda: store.get('k'), '500')
        self.assertEqual(self.wire.count, 10 + 20 // 5)

    def test_delays_grow_and_are_drawn(self):
        self.limits(first_delay=0.1, first_delay_if_slow=1.0)
        slow = mock.Mock(slow=lambda: True)
        for answer, most in ((None, [0.1, 0.2, 0.4, 0.8, 1.6]),
                             (slow, [1, 2, 4, 8, 16, 20, 20])):
            for tries, limit in enumerate(most, 1):
                drawn = [tarsnapd.Bucket._delay(answer, tries)
                         for _ in range(200)]
                self.assertTrue(all(0 <= x <= limit for x in drawn))
                self.assertGreater(max(drawn) - min(drawn), limit / 2)

    def test_an_answer_that_is_no_list_is_no_empty_one(self):
        store = self.store(plan=lambda number, method, path: (
            'empty' if 'list-type' in path else None))
        store.put('k', b'')
        self.fails(tarsnapd.StoreError, lambda: store.list(''),
                   'not a list')

    def test_an_object_that_changed_on_the_way_is_not_believed(self):
        store = self.store(plan=lambda number, method, path: (
            'flip' if method == 'GET' else None))
        store.put('k', b'content')
        self.fails(tarsnapd.Damaged, lambda: store.get('k'),
                   'checksum does not match')

    def test_a_server_that_replaces_objects_is_refused(self):
        store = self.store('open', plan=lambda *_: 'unconditional')
        self.fails(tarsnapd.ServerError, store.prepare, 'If-None-Match',
                   store.name)
        self.assertEqual(store.list(''), ['probe'])

    def test_a_server_that_ignores_range_is_noticed(self):
        store = self.store('open', plan=lambda *_: 'whole')
        store.put('k', b'content')
        self.assertEqual(store.get('k'), b'content')
        self.fails(tarsnapd.StoreError, lambda: store.get('k', 1, 2),
                   'ignores Range')

    def test_connections_closed_while_idle(self):
        self.limits(attempts=1)
        store = self.store('swift', plan=lambda *_: 'bye')
        for i in range(5):
            store.put('k%d' % i, b'')
            time.sleep(0.05)
        self.assertEqual(self.wire.connections, 5)

    def test_a_forked_process_has_connections_of_its_own(self):
        store = self.store('swift', plan=lambda *_: None)
        store.put('k', b'content')
        child = os.fork()
        if child == 0:
            os._exit(store.get('k') != b'content')
        self.assertEqual(os.waitpid(child, 0)[1], 0)
        self.assertEqual(store.get('k'), b'content')
        self.assertEqual(self.wire.connections, 2)


class Secure(Case):
    """Over TLS, with a certificate that only s3-ca-bundle vouches for."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.pem = os.path.join(folder.name, 'pem')
        s3peers.certificate(self.pem)

    def test_tls(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.pem)
        wire = Wire(self, PEERS['swift'], tls=context)
        with_port = 'https://%s:' + str(wire.port)
        store = self.store('swift', **{
            's3-endpoint': with_port % 'localhost', 's3-ca-bundle': self.pem})
        data = os.urandom(3 << 20)
        self.assertTrue(store.put('k', data))
        self.assertFalse(store.put('k', b''))
        self.assertEqual(store.get('k'), data)
        self.assertEqual(store.list(''), ['k'])
        self.assertEqual((wire.count, wire.connections), (4, 1))
        self.limits(attempts=1)
        for what, host, bundle in (
                ('unknown', 'localhost', None),
                ('another host', '127.0.0.1', self.pem)):
            with self.subTest(what):
                store = self.store('swift', **{
                    's3-endpoint': with_port % host, 's3-ca-bundle': bundle})
                self.fails(tarsnapd.StoreError, lambda: store.get('k'),
                           'read s3://backup/', 'certificate verify failed')
        self.assertEqual(wire.count, 4)


class Where(Case):
    """Endpoint, region and how the bucket is addressed."""

    TABLE = [
        # conf, environment, secure, host, port
        ({}, {}, (True, 'b.s3.us-east-1.amazonaws.com', None)),
        ({'s3-region': 'eu-central-1'}, {'AWS_REGION': 'x'},
         (True, 'b.s3.eu-central-1.amazonaws.com', None)),
        ({}, {'AWS_REGION': 'eu-west-1', 'AWS_DEFAULT_REGION': 'x'},
         (True, 'b.s3.eu-west-1.amazonaws.com', None)),
        ({'s3-region': 'cn-north-1'}, {},
         (True, 'b.s3.cn-north-1.amazonaws.com.cn', None)),
        ({'s3-addressing': 'path'}, {},
         (True, 's3.us-east-1.amazonaws.com', None)),
        ({'s3-endpoint': 'http://[::1]:9000'}, {'AWS_ENDPOINT_URL': 'x'},
         (False, '::1', 9000)),
        ({'s3-endpoint': 'https://o.example/', 's3-addressing': 'virtual'},
         {}, (True, 'b.o.example', None)),
        ({}, {'AWS_ENDPOINT_URL_S3': 'http://a', 'AWS_ENDPOINT_URL': 'x'},
         (False, 'a', None)),
        ({}, {'AWS_ENDPOINT_URL': 'http://a',
              'AWS_IGNORE_CONFIGURED_ENDPOINT_URLS': 'true'},
         (True, 'b.s3.us-east-1.amazonaws.com', None)),
    ]

    def test_where_requests_go(self):
        for conf, environ, wanted in self.TABLE:
            with self.subTest(conf=conf, environ=environ), \
                    environment(environ):
                self.assertEqual(
                    tarsnapd.Bucket('b', conf).split_endpoint(), wanted)

    def test_the_bucket_in_the_host_name(self):
        # Signed with that name, which moto looks at to find the bucket.
        real = socket.getaddrinfo

        def here(host, *args, **options):
            self.assertEqual(host, 'backup.s3.amazonaws.com')
            return real('127.0.0.1', *args, **options)

        store = self.store('moto', **{
            's3-endpoint': 'http://s3.amazonaws.com:%d' % PEERS['moto'].port,
            's3-addressing': 'virtual'})
        self.enter(mock.patch.object(socket, 'getaddrinfo', here))
        store.prepare()
        self.assertTrue(store.put('a key', b'content'))
        self.assertFalse(store.put('a key', b'other'))
        self.assertEqual(store.get('a key'), b'content')
        self.assertEqual(store.list(''), ['a key', 'probe'])
        store.bucket.close()
        socket.getaddrinfo = real
        by_path = tarsnapd.S3Store(store.name, {})
        self.assertEqual(by_path.get('a key'), b'content')
        by_path.close()

    def test_a_bucket_with_a_dot_is_addressed_by_path(self):
        with environment({}):
            self.assertEqual(tarsnapd.Bucket('b.c', {}).split_endpoint()[1],
                             's3.us-east-1.amazonaws.com')


class Who(Case):
    """Where credentials come from."""

    FIXED = [
        ('configuration before environment',
         {'s3-access-key': 'A', 's3-secret-key': 'S'},
         {'AWS_ACCESS_KEY_ID': 'no', 'AWS_SECRET_ACCESS_KEY': 'no'},
         ('A', 'S', None)),
        ('environment before files', {},
         {'AWS_ACCESS_KEY_ID': 'A', 'AWS_SECRET_ACCESS_KEY': 'S',
          'AWS_SESSION_TOKEN': 'T'}, ('A', 'S', 'T')),
        ('default profile', {}, {}, ('da', 'd%s', None)),
        ('profile by environment', {}, {'AWS_PROFILE': 'one'},
         ('oa', 'os', 'ot')),
        ('profile by configuration', {'s3-profile': 'two'},
         {'AWS_PROFILE': 'one'}, ('ta', 'ts', None)),
    ]

    def files(self):
        """Shared files; the environment that names them."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        texts = {
            'AWS_SHARED_CREDENTIALS_FILE':
                '[default]\naws_access_key_id = da\n'
                'aws_secret_access_key = d%s\n[one]\naws_access_key_id = oa\n'
                'aws_secret_access_key = os\naws_session_token = ot\n',
            'AWS_CONFIG_FILE':
                '[profile two]\naws_access_key_id = ta\nregion = two-region\n'
                'aws_secret_access_key = ts\ns3 =\n  max_queue_size = 5\n'
                'endpoint_url = https://two.example\n[profile three]\n'
                'region = three-region\nservices = mine\n[services mine]\n'
                'sqs =\n  endpoint_url = https://no.example\n'
                's3 =\n  endpoint_url = https://three.example\n'}
        names = {}
        for variable, text in texts.items():
            names[variable] = os.path.join(folder.name, variable)
            with open(names[variable], 'w') as file:
                file.write(text)
        return names

    def find(self, conf=()):
        conf = dict(conf)
        return tarsnapd.credentials_find(conf, tarsnapd.aws_profile(conf))

    def test_fixed(self):
        files = self.files()
        for name, conf, environ, wanted in self.FIXED:
            with self.subTest(name), environment(dict(files, **environ)):
                self.assertEqual(tuple(self.find(conf))[:3], wanted)

    def test_profile_gives_region_and_endpoint(self):
        with environment(dict(self.files(), AWS_PROFILE='two')):
            bucket = tarsnapd.Bucket('bucket', {})
            self.assertEqual(bucket.region, 'two-region')
            self.assertEqual(bucket.split_endpoint()[1], 'two.example')
        with environment(dict(self.files(), AWS_PROFILE='three')):
            bucket = tarsnapd.Bucket('bucket', {})
            self.assertEqual(bucket.split_endpoint()[1], 'three.example')

    def test_refused(self):
        off = {'AWS_EC2_METADATA_DISABLED': 'true'}
        for name, environ, says in (
                ('none', off, 'no S3 credentials'),
                ('half', {'AWS_ACCESS_KEY_ID': 'A'}, 'belong together'),
                ('profile', {'AWS_PROFILE': 'gone'}, 'no profile gone'),
                ('container', {'AWS_CONTAINER_CREDENTIALS_FULL_URI':
                               'http://127.0.0.1:1/x'}, '127.0.0.1:1')):
            with self.subTest(name), environment(environ):
                self.fails(tarsnapd.ServerError, self.find, says)

    def test_instance(self):
        """moto answers like the metadata service of an instance."""
        with environment({'AWS_EC2_METADATA_SERVICE_ENDPOINT':
                          PEERS['moto'].endpoint}):
            found = self.find()
        self.assertTrue(found.access and found.secret and found.token)
        self.assertGreater(found.expires, time.time())

    def service(self, answer):
        """A loopback HTTP server: answer(method, path, headers) is the body
        as str or JSON, or a status.  Its URL.
        """
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                found = answer(self.command, self.path, self.headers)
                status = found if isinstance(found, int) else 200
                body = (found if isinstance(found, str)
                        else json.dumps(found)).encode()
                self.send_response(status)
                self.send_header('Content-Length', str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_PUT = do_GET

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        return 'http://127.0.0.1:%d' % server.server_port

    @staticmethod
    def keys(seconds):
        """What an endpoint answers: moto's keys, good for so long."""
        peer = PEERS['moto']
        return {'AccessKeyId': peer.access, 'SecretAccessKey': peer.secret,
                'Expiration': time.strftime(
                    '%Y-%m-%dT%H:%M:%SZ', time.gmtime(time.time() + seconds))}

    def without_keys(self):
        store = self.store()
        for name in ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY'):
            del os.environ[name]
        return store

    def test_container_and_renewal(self):
        asked = []

        def answer(method, path, headers):
            asked.append((method, path, headers['Authorization']))
            return self.keys(60 if len(asked) == 1 else 7200)

        store = self.without_keys()
        os.environ.update(
            AWS_CONTAINER_CREDENTIALS_FULL_URI=self.service(answer) + '/role',
            AWS_CONTAINER_AUTHORIZATION_TOKEN='token')
        store.put('a', b'')
        self.assertEqual(asked, [('GET', '/role', 'token')])
        store.put('b', b'')
        store.put('c', b'')
        self.assertEqual(len(asked), 2)     # the first were about to expire

    def test_container_by_relative_uri_and_a_token_in_a_file(self):
        asked = []

        def answer(method, path, headers):
            asked.append((method, path, headers['Authorization']))
            return self.keys(7200)

        self.enter(mock.patch.object(tarsnapd, 'CONTAINER',
                                     self.service(answer)))
        with tempfile.NamedTemporaryFile() as file:
            file.write(b'from a file\n')
            file.flush()
            store = self.without_keys()
            os.environ.update(
                AWS_CONTAINER_CREDENTIALS_RELATIVE_URI='/v2/role',
                AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE=file.name)
            store.put('a', b'')
        self.assertEqual(asked, [('GET', '/v2/role', 'from a file')])

    def test_an_instance_that_insists_on_version_2(self):
        asked, life = [], [60]

        def answer(method, path, headers):
            asked.append((method, path))
            if (method, path) == ('PUT', '/latest/api/token'):
                good = headers['X-aws-ec2-metadata-token-ttl-seconds']
                return 'TOKEN' if good == '21600' else 400
            if headers['X-aws-ec2-metadata-token'] != 'TOKEN':
                return 401
            if path == '/latest/meta-data/iam/security-credentials/':
                return 'the-role\n'
            if path.endswith('/the-role') and life[0]:
                return self.keys(life[0])
            return 500

        store = self.without_keys()
        os.environ.pop('AWS_EC2_METADATA_DISABLED')
        os.environ['AWS_EC2_METADATA_SERVICE_ENDPOINT'] = (
            self.service(answer) + '/')
        # Proxies are for others.
        os.environ.update(http_proxy='http://127.0.0.1:1',
                          HTTP_PROXY='http://127.0.0.1:1')
        store.put('a', b'')
        self.assertEqual(len(asked), 3)
        life[0] = 0                     # the service fails for a while
        store.put('b', b'')             # what we have still does
        self.assertGreater(len(asked), 3)
        life[0] = 7200
        store.put('c', b'')
        before = len(asked)
        store.put('d', b'')
        self.assertEqual(len(asked), before)
        os.environ['AWS_EC2_METADATA_DISABLED'] = 'true'
        self.fails(tarsnapd.ServerError, self.find, 'no S3 credentials')


if __name__ == '__main__':
    unittest.main()
