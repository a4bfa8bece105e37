#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Hostile bytes for everything that takes bytes apart.

usage: tests/fuzz.py [--seconds N] [--cases N] [--seed S] [--target NAME ...]
                     [--engine mutation|atheris] [--list]

A target is a function of bytes.  Whatever they are, it may raise what it says
it may, which is always an error of the project's own; any other exception, a
traceback on standard error, more than LATE seconds, or more memory than it is
worth is a defect.  What was found is printed with the bytes in hexadecimal,
and belongs into REGRESSIONS of test_fuzz.py once it is mended.

Each target runs in a process of its own, whose address space is limited.  By
default valid samples are spoilt, one to several places of each; with atheris
(from PyPI, where it installs) what is new to the coverage of the programs is
spoilt further.  Where a checksum or a signature stands in front, half of the
cases have it made good again, so that what is behind it is reached.
"""

import argparse
import contextlib
import gc
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import zlib
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]

import lab              # noqa: E402
import samples          # noqa: E402
import storefake        # noqa: E402
import tarsnap          # noqa: E402
import tarsnapd         # noqa: E402

LATE = 5                # seconds
ROOM = 512 << 20        # bytes of address space above what is there already
GROWTH = 48 << 20       # bytes that the process may grow by in one case

# What the two programs raise on purpose.
CLIENT = (tarsnap.Error,)
SERVER = (tarsnapd.Refused, tarsnapd.StoreError, tarsnapd.ServerError)
TARGETS = {}


class Hang(BaseException):
    """A case took too long."""


class Found(Exception):
    """A case broke a promise that is not about exceptions."""


def target(name, allowed):
    """Enter a function that makes (samples, function of bytes)."""
    def enter(make):
        TARGETS[name] = make, allowed
        return make
    return enter


def key_of():
    """A full key, always the same one."""
    import format_examples
    return format_examples.example_key()


##############################################################################
# The server: frames and requests, what it stores, what it is told
##############################################################################


@target('frames', SERVER)
def frames():
    good = b''.join(tarsnapd.FRAME.pack(len(body), kind, 1) + body
                    for kind, body in ((1, b'\0\1'), (11, bytes(60)),
                                       (9, bytes(2))))

    def run(data):
        stream = tarsnapd.Frames()
        stream.ceiling = tarsnapd.CEILING[
            'frame' if data[:1] > b'\x7f' else 'frame before auth']
        step = data[1] + 1 if len(data) > 1 else 1
        for at in range(2, len(data), step):
            stream.buf += data[at:at + step]
            while stream.next():
                pass
    return [b'\0\x10' + good, b'\xff\x01' + good], run


class Requests:
    """A store directory, renewed now and then, and sessions with it.

    A case is frames (type, length u16, body); of a commit object a first
    byte of 1 has the signature made good.
    """

    def __init__(self, known):
        import rawclient
        self.raw = rawclient
        self.known = known          # the session has proven all roles
        self.top = tempfile.mkdtemp(prefix='fuzz-')
        self.path = os.path.join(self.top, 'srv')
        client = rawclient.Client(rawclient.Embedded(self.path, create=True))
        self.host = rawclient.Host(client)
        roles = (rawclient.R, rawclient.W, rawclient.D, rawclient.N)
        client.auth(self.host.machine, self.host.keys, *roles)
        self.archive, self.record, self.names = self.host.backup(client, 'x')
        client.close()
        server = tarsnapd.Server(self.path)
        server.run(tarsnapd.account_create('joe', b'pw'))
        server.close()
        shutil.copytree(self.path, self.path + '.good')
        self.server, self.cases = None, 0
        self.said = []

    def renew(self):
        if self.server:
            self.server.close()
        shutil.rmtree(self.path)
        shutil.copytree(self.path + '.good', self.path)
        self.server = tarsnapd.Server(self.path, self.said.append)

    def bodies(self):
        """A good request of each type."""
        raw, host, tid = self.raw, self.host, bytes(range(16))
        ids = raw.names_body([self.archive, self.record] + self.names)
        begin = tid + bytes(16) + raw.u64(1) + host.head
        writing = b''.join(raw.block('i', 'f'))
        return {
            'HELLO': b'\0\1', 'REGISTER1': bytes(32) + b'\3joe',
            'REGISTER2': b'\4host' + bytes(160), 'AUTH': bytes(107),
            'STAT': b'', 'CHANGES': raw.u64(0) + bytes(32) + b'\1',
            'LIST': ids, 'GET': b'\3' + ids, 'HAS': ids,
            'BEGIN': b'\1' + begin + b'\0', 'PUT': writing, 'WITHDRAW': ids,
            'BEGIN D': b'\2' + begin + b'\1' + bytes(32), 'DELETE': ids,
            'CHECKPOINT': b'\1' + host.build(tid, puts=[writing[:32]]),
            'COMMIT': b'\1' + host.build(
                tid, puts=[writing[:32]], linked=[(bytes(32), self.record,
                                                   bytes(16), 3)]),
            'COMMIT D': b'\1' + host.build(
                tid, kind=2, unlinked=[(self.archive, self.record)],
                deletes=self.names + [self.record]),
            'ABORT': b'', 'NUKE': b'\1' + host.build(tid, kind=3),
            'REVIVE': ids, 'ACCOUNT': b'\1'}

    def samples(self):
        bodies = self.bodies()

        def join(*names):
            return b''.join(struct.pack('>BH', self.raw.REQUEST[
                name.split()[0]], len(bodies[name])) + bodies[name]
                for name in names)

        return [join(name) for name in sorted(bodies)] + [
            join('REGISTER1', 'REGISTER2'), join('BEGIN', 'PUT', 'COMMIT'),
            join('BEGIN', 'PUT', 'WITHDRAW', 'CHECKPOINT', 'PUT', 'ABORT'),
            join('BEGIN D', 'DELETE', 'COMMIT D', 'REVIVE'),
            join('LIST', 'GET', 'CHANGES'), join('NUKE', 'CHANGES')]

    def signed(self, body):
        """A commit object, signed for its kind if its first byte asks."""
        good, body = body[:1] == b'\1', body[1:]
        role = tarsnapd.KIND_ROLE.get(body[64] if len(body) > 64 else 0)
        if good and role and len(body) > 64:
            body = body[:-64] + self.host.keys.private[role].sign(
                b'tarsnap-history-1\0' + body[:-64])
        return body

    def run(self, data):
        if self.cases % 2000 == 0:
            self.renew()
        self.cases += 1
        local = tarsnapd.Local(
            self.server, tarsnapd.TRANSPORT_STDIO,
            self.host.machine if not self.known else None)
        session = local.session
        if self.known:
            session.machine = self.server.run(
                tarsnapd.machine_load(self.host.machine))
            session.genesis = tarsnapd.genesis(
                self.host.machine, self.server.store_id,
                session.machine.keys)
            session.roles = 'rwdn'
        try:
            at = 0
            while at + 3 <= len(data) and not session.over:
                kind, length = struct.unpack_from('>BH', data, at)
                body = data[at + 3:at + 3 + length]
                at += 3 + length
                if kind in tarsnapd.COMMIT_KINDS:
                    body = self.signed(body)
                self.check(local.receive(kind, 7, body))
            self.check(local.idle())
        finally:
            for _ in tarsnapd.drive(self.server, session.end(), 0):
                pass

    def check(self, answers):
        for kind, rid, body in answers:
            if kind < 129 or rid not in (0, 7):
                raise Found('answer %d to %d' % (kind, rid))
            if kind == tarsnapd.ERROR and body[:2] == b'\0\x10':
                raise Found('INTERNAL: %s' % body[2:].decode())


@target('stranger', ())
def stranger():
    requests = Requests(False)
    return requests.samples(), requests.run


@target('member', ())
def member():
    requests = Requests(True)
    return requests.samples(), requests.run


def put_checksum(data):
    """Half of the cases get the right SHA-256 at their end."""
    body = data[1:-32] if len(data) > 32 else data
    return body + hashlib.sha256(body).digest() if data[:1] < b'\x80' \
        else data[1:]


@target('log', SERVER)
def log():
    entry = tarsnapd.Entry(5, 3, bytes(32), 99, b'')
    entry.segments = [('seg/%016x/%s/000001-00' % (5, '0' * 32), 500,
                       bytes(32), 9, b'\0\1')]
    entry.drops = ['seg/%016x/x' % 5]
    with_commit = tarsnapd.Entry(5, 3, bytes(32), 99, commit_sample()[0])

    def run(data):
        entry = tarsnapd.log_decode(5, 3, put_checksum(data))
        tarsnapd.Loaded(entry)
    return [b'\0' + tarsnapd.log_encode(x) for x in (entry, with_commit)], run


def commit_sample():
    """(C_n, its key)."""
    key = key_of()
    commit = tarsnap.Commit(key.machine, 1, bytes(32), 1, bytes(16))
    commit.linked = [(bytes(32), bytes(32), bytes(16), 3)]
    commit.unlinked = [(bytes(32), bytes(32))]
    commit.note = tarsnap.note_seal(key, 1, (1,) * 9)
    return tarsnap.commit_pack(commit, key), key


@target('commit', SERVER + CLIENT)
def commit():
    good, key = commit_sample()

    def run(data):
        raw = data[1:]
        if data[:1] < b'\x80':
            raw = raw[:-64] + tarsnap.sign(
                key.sign_privs[2], tarsnap.HISTORY_CONTEXT + raw[:-64])
        with contextlib.suppress(*SERVER):
            tarsnapd.commit_decode(raw)
        tarsnap.note_open(key, tarsnap.commit_unpack(raw, key))
    return [b'\0' + good, b'\xff' + good], run


class OneObject:
    """The wishes of steps that read one object."""

    def __init__(self, data):
        self.data = data

    def run(self, steps):
        return tarsnapd.carry_out(steps, self.perform)

    def perform(self, wish):
        if wish[0] == 'size':
            return len(self.data)
        _, key, offset, length = wish
        end = None if length is None else offset + length
        value = self.data[offset:end]
        if length is not None and len(value) != length:
            raise tarsnapd.Damaged('read', key, 'short read')
        return value


def segment_bytes():
    """A segment with a block and lists."""
    rows, body = b'', tarsnapd.SEGMENT_MAGIC
    import rawclient
    for cls, name, data in ((b'c', bytes(32), rawclient.block('c', 'x')[2]),
                            (b'w', bytes(32), bytes(64)),
                            (b'd', bytes(32), bytes(32)),
                            (b'r', bytes(32), bytes(37))):
        crc = zlib.crc32(data, zlib.crc32(tarsnapd.ENTRY_SUM.pack(
            tarsnapd.ENTRY_MAGIC, cls, name, len(data))))
        body += tarsnapd.ENTRY.pack(tarsnapd.ENTRY_MAGIC, cls, name,
                                    len(data), crc)
        rows += tarsnapd.ROW.pack(name, cls, len(body), len(data),
                                  hashlib.sha256(data).digest())
        body += data
    return body, rows


def segment_end(body, table):
    return table + tarsnapd.FOOTER.pack(
        len(body), len(table) // tarsnapd.ROW.size,
        hashlib.sha256(table).digest(), tarsnapd.FOOTER_MAGIC)


@target('segment', SERVER)
def segment():
    body, table = segment_bytes()

    def run(data):
        if data[:1] < b'\x80':      # a table that is damaged and signed for
            rows = data[1:1 + len(data[1:]) // 77 * 77]
            data = b'?' + body + segment_end(body, rows)
        store = OneObject(data[1:])
        found = store.run(tarsnapd.segment_load('seg/1/2/000001-0'))
        for cls in b'wdr':
            store.run(tarsnapd.segment_lists(found, bytes([cls])))
        store.run(tarsnapd.segment_past('seg/1/2/000001-0', len(data) - 1,
                                        found.table_hash, found.count))
        for _ in tarsnapd.linked_puts([found.table], {}):
            pass
    return [b'\xff' + body + segment_end(body, table), b'\0' + table], run


@target('extract', SERVER)
def extract():
    _, table = segment_bytes()
    good = tarsnapd.extract_encode(table, [bytes(64), bytes(32), bytes(37)])

    def run(data):
        tarsnapd.extract_decode('list/1', put_checksum(data))
    return [b'\0' + good, b'\xff' + good], run


@target('spool', SERVER)
def spool():
    top, (body, _) = tempfile.mkdtemp(prefix='fuzz-'), segment_bytes()

    def run(data):
        spools = tarsnapd.SpoolDir(top)
        open_one = spools.open(1, bytes(16))
        with open(open_one.stem + '-000001', 'wb') as file:
            file.write(data)
        try:
            open_one.scan((), True)
            for _ in open_one.puts():
                pass
        finally:
            open_one.close(True)
    return [body], run


@target('block', SERVER)
def block():
    import rawclient
    good = [rawclient.block(cls, 'x') for cls in 'cia']

    def run(data):
        tarsnapd.block_check(data[:1], data[1:])
    return [cls + sealed for _, cls, sealed in good], run


@target('versioned', SERVER)
def versioned():
    place = 'machine/%016x/999999999999' % 1
    good = [tarsnapd.versioned_encode(place, value) for value in (
        {'name': 'x', 'user': 'joe', 'keys': '0' * 256, 'time': 5,
         'delays': [[3, 4]], 'frozen': 'r'},)] + [
             b'{"account": "x"}', b'[1]', b'"x"', b'1', b'null']

    def run(data):
        if data[:1] < b'\x80':
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(data[1:])
                if isinstance(value, dict):
                    value.pop('sum', None)
                    data = b'?' + tarsnapd.versioned_encode(place, value)
        tarsnapd.versioned_decode(place, data[1:])
        for decode in (tarsnapd.store_id_decode,
                       lambda x: tarsnapd.number_decode('x', x)):
            with contextlib.suppress(*SERVER):
                decode(data[1:])
    return [b'\xff' + x for x in good] + [b'\0' + good[0], b'\0' + b'0' * 33,
                                          b'\0' + b'0' * 16], run


@target('tarsnapd.conf', SERVER)
def tarsnapd_conf():
    top = tempfile.mkdtemp(prefix='fuzz-')
    path = os.path.join(top, 'srv')
    tarsnapd.server_create(path)
    with open(os.path.join(path, 'tarsnapd.conf'), 'rb') as file:
        good = file.read()

    def run(data):
        with open(os.path.join(path, 'tarsnapd.conf'), 'wb') as file:
            file.write(data)
        conf = tarsnapd.conf_read(path)
        if not set(conf) & {'store', 'accounts', 'journal'}:
            tarsnapd.Server(path).close()
        for read, name in ((tarsnapd.size_parse, 'scrub-rate'),
                           (tarsnapd.clean_conf, None),
                           (tarsnapd.listen_check, 'listen')):
            with contextlib.suppress(*SERVER):
                read(conf.get(name, '1') if name else conf)
    return [good, good.replace(b'#', b''), b'[server]\nlisten = :0\n'
            b'read-only = yes\nworkers = 1\ndelete-delay = 7\n'
            b'clean-hours = 3\nclean-rate = 3k\n'], run


def payment_samples():
    """(name of a checkout, what it is about, lines of JSON)"""
    name = 'ab' * 8 + '-' + '65' * 12
    checkout = {'provider': 'stripe', 'cents': 1000, 'time': 0,
                'currency': 'USD'}
    money = {'value': '10.00', 'currency_code': 'USD'}
    capture = {'id': 'C1', 'status': 'COMPLETED', 'custom_id': name,
               'amount': money}
    refund = {'id': 'R1', 'status': 'COMPLETED', 'amount': money, 'links': [
        {'rel': 'up', 'href': 'https://x/v2/payments/captures/C1'}]}
    order = {'id': 'S1', 'status': 'COMPLETED', 'purchase_units': [{
        'custom_id': name, 'payments': {'captures': [capture],
                                        'refunds': [refund]}}]}
    session = {'id': 'S1', 'object': 'checkout.session', 'currency': 'usd',
               'status': 'complete', 'payment_status': 'paid',
               'metadata': {'checkout': name}, 'amount_total': 1000,
               'payment_intent': {'status': 'succeeded'}}
    intent = {'metadata': {'checkout': name}}
    back = {'data': [{'id': 'R1', 'amount': 10, 'currency': 'usd',
                      'status': 'won'}], 'has_more': False}

    def event(kind, thing):
        return {'type': kind, 'data': {'object': thing}, 'event_type': kind,
                'id': 'W1', 'resource': thing}

    lines = [
        (b's', event('checkout.session.completed', session), session),
        (b's', event('charge.dispute.closed', {
            'object': 'dispute', 'payment_intent': 'P1'}), intent, session,
            back),
        (b's', event('refund.created', {'payment_intent': 'P1'}), intent,
            session, back),
        (b'p', event('CHECKOUT.ORDER.APPROVED', order), dict(
            order, status='APPROVED'), {}, order),
        (b'p', event('PAYMENT.CAPTURE.REVERSED', refund), capture, order,
            {'items': [{'dispute_id': 'D1'}]},
            {'dispute_outcome': {'outcome_code': 'DENIED'}}),
        (b'p', event('CUSTOMER.DISPUTE.RESOLVED', {'disputed_transactions': [
            {'seller_transaction_id': 'C1'}]}), capture, order),
        (b'S', {'data': [event('checkout.session.completed', session)]},
            session),
        (b'P', {'events': [event('CHECKOUT.ORDER.APPROVED', order)],
                'links': [{'rel': 'next', 'href': 'x/v1/y'}]},
            {'events': []}, order)]
    return name, checkout, [
        b'\n'.join([kind] + [json.dumps(x).encode() for x in answers])
        for kind, *answers in lines]


@target('payments', SERVER + (tarsnapd.ProviderError,))
def payments():
    """What providers answer, a line each: an event, and what its steps ask
    for then.  The first byte says what is done.
    """
    import paypeer
    import types
    name, checkout, good = payment_samples()
    shop = types.SimpleNamespace(post=None, prices=None, lax=lambda _: False)

    def run(data):
        kind, *answers = data.split(b'\n')
        store = {}
        for place, value in (('asked', dict(
                checkout, provider='stripe' if kind in (b's', b'S')
                else 'paypal')), ('made', {'session': 'S1'})):
            key = tarsnapd.checkout_key(place, name)
            store[key] = tarsnapd.versioned_encode(key, value)
        provider = paypeer.Answers(answers)
        out = tarsnapd.Outcome()
        if kind in (b's', b'p'):
            steps = (tarsnapd.stripe_event if kind == b's' else
                     tarsnapd.paypal_event)(shop, out, provider.next())
        else:
            steps = tarsnapd.events_read(
                shop, out, 'stripe' if kind == b'S' else 'paypal', 1700000000)
        paypeer.drive(steps, store, provider)
        for key, data in store.items():
            if key.startswith('pay/'):
                found = tarsnapd.money_decode(key, data)
                if not 0 < abs(found.amount) <= 10 * tarsnapd.ATTO:
                    raise Found('%s %d' % (key, found.amount))
    return good, run


@target('s3-answers', SERVER + (ValueError,))
def s3_answers():
    good = (b'<?xml version="1.0"?><ListBucketResult xmlns="x">'
            b'<IsTruncated>true</IsTruncated><Contents><Key>a%20b</Key>'
            b'</Contents><NextContinuationToken>t</NextContinuationToken>'
            b'</ListBucketResult>')

    def run(data):
        root = tarsnapd.xml_parse(data)
        for found in tarsnapd.xml_all(root, 'Contents'):
            tarsnapd.xml_text(found, 'Key')
    return [good], run


##############################################################################
# The client: key files, what a server says, what a writer stored
##############################################################################


@target('keyfile', CLIENT)
def keyfile():
    content = tarsnap.key_encode(key_of())
    start = len(tarsnap.KEY_MAGIC) + 33

    def run(data):
        how, data = data[:1], data[1:]
        if how < b'\x55':           # fields, the checksum made good
            data = content[:start - 32] + hashlib.sha256(
                data).digest() + data
        elif how < b'\xaa':         # text
            data = tarsnap.key_untext(data, 'k')
        tarsnap.key_decode(data, 'k')
    return [b'\0' + content[start:], b'\xff' + content,
            b'\x60' + tarsnap.key_text(content)], run


@target('keyfile-scrypt', CLIENT)
def keyfile_scrypt():
    content = tarsnap.key_encode(key_of())
    with mock.patch.object(tarsnap, 'scrypt_speed', lambda: 1e-3):
        good = tarsnap.scrypt_encrypt(content, b'pw', 1 << 20, 1.0)
    # What may be spent: 4 MB, and as much mixing.
    mock.patch.object(tarsnap, 'scrypt_speed', lambda: 1e-6).start()
    mock.patch.object(tarsnap, 'SCRYPT_SECONDS', 4).start()

    def run(data):
        how, data = data[:1], data[1:]
        if how < b'\x80' and len(data) > 64:
            data = data[:48] + hashlib.sha256(data[:48]).digest()[:16] \
                + data[64:]
        tarsnap.key_decode(tarsnap.scrypt_decrypt(data, lambda: b'pw', 'k'),
                           'k')
    return [b'\0' + good, b'\xff' + good], run


def archive_store():
    """(Store with an archive of every kind of entry, its Record)."""
    store = storefake.Store()
    builder = storefake.Builder(store, per_page=4, fan=2, lists_above=3)
    for number in range(12):
        builder.add(b'd/f%d' % number, data=b'%d' % number * 3000)
    builder.add(b'dir', tarsnap.DIRECTORY)
    builder.add(b'sym', tarsnap.SYMLINK, target=b'dir')
    builder.add(b'dev', tarsnap.CHARDEV, device=(1, 3))
    builder.add(b'holes', parts=[b'x' * 100, 5000, (b'y' * 50, 9)])
    builder.add(b'long', parts=[b'%d' % i * 99 for i in range(9)])
    builder.add(b'attr', data=b'z', link=(5, 1), atime=7,
                xattrs=((b'user.a', b'b'), (b'user.long', b'v' * 5000)))
    return store, builder.finish(argv=[b'tarsnap', b'-c'])


@target('sealed', CLIENT)
def sealed():
    """What a hostile server sends in place of a block."""
    store, _ = archive_store()
    opener = tarsnap.Opener(store.key)
    blocks = sorted(store.blocks.items())
    by_class = {}
    for name, data in blocks:
        by_class.setdefault(data[1:2], (name, data))

    def run(data):
        cls = b'cia'[data[0] % 3:][:1] if data else b'c'
        opener.open(cls, data[1:33], data[33:])
    return [bytes([b'cia'.index(cls)]) + name + data
            for cls, (name, data) in sorted(by_class.items())], run


@target('plain', CLIENT)
def plain():
    """What a hostile writer sealed: frames, bombs, index blocks, rows."""
    store, _ = archive_store()
    opener = tarsnap.Opener(store.key)
    found = []
    for name, data in sorted(store.blocks.items()):
        if data[1:2] == b'i':
            found.append(opener.open(b'i', name, data))

    def run(data):
        how, data = data[:1], data[1:]
        if how < b'\x40':
            tarsnap.unframe_plain(data, tarsnap.CEILING['part'], 'x')
            return
        length, = struct.unpack('>H', data[:2].rjust(2, b'\0'))
        refs, rows = data[2:2 + length], data[2 + length:]
        block = tarsnap.index_unpack(refs, bytes(32))
        block.rows = rows
        if block.kind == tarsnap.PAGE:
            for entry in tarsnap.page_entries(block):
                tarsnap.json_entry(entry, entry.path)
                tarsnap.path_escape(entry.path)
        elif block.kind == tarsnap.PAGE_LIST:
            tarsnap.list_notes(block)
        else:
            tarsnap.list_extents(block)
    bomb = tarsnap.frame_plain(bytes(200000), 9, True)
    return [b'\xff' + struct.pack('>H', len(refs)) + refs + rows
            for refs, rows in found] + [
                b'\0' + bomb, b'\0' + tarsnap.frame_plain(b'x', 0, True)], run


@target('record', CLIENT)
def record():
    store, made = archive_store()
    parts = tarsnap.Opener(store.key).open(b'a', made.name,
                                           store.blocks[made.name])
    at = len(tarsnap.RECORD_MAGIC) + tarsnap.RECORD_HEAD.size - 66

    def run(data):
        how, data = data[:1], data[1:]
        lengths = struct.unpack('>HHH', data[:6].rjust(6, b'\0'))
        pieces, pos = [], 6
        for length in lengths:
            pieces.append(data[pos:pos + length])
            pos += length
        if how < b'\x80':           # digests and signature made good
            refs = pieces[0][:at] + tarsnap.sha256(pieces[1]) \
                + tarsnap.sha256(pieces[2]) + pieces[0][at + 64:-64]
            pieces[0] = refs + tarsnap.sign(store.key.sign_privs[2], refs)
        tarsnap.record_unpack(pieces, bytes(32), store.key)
    good = struct.pack('>HHH', *map(len, parts)) + b''.join(parts)
    return [b'\0' + good, b'\xff' + good], run


class Said:
    """A Remote of which every answer is in the bytes of the case."""

    def __init__(self, key, answers):
        self.key = key
        self.answers = answers
        self.head = (1, bytes(32))

    def connect(self):
        return self

    def saw(self, n, head):
        pass

    def post(self, kind, *body):
        return 1

    def stream(self, rid):
        for kind, body in self.answers:
            if kind == tarsnap.ERROR:
                raise tarsnap.refusal(body)
            yield kind, body

    def call(self, kind, *body):
        return next(iter(self.answers), (tarsnap.OK, b''))

    def ask(self, kind, *body):
        return list(self.stream(1))


@target('answers', CLIENT)
def answers():
    """What a hostile server says; frames of type, length u16, body."""
    raw, key = commit_sample()
    row = bytes(32) + b'c' + bytes(4)
    said = [(tarsnap.COMMIT_OBJECT, bytes(8) + raw),
            (tarsnap.ADDED, b'\0\1' + row), (tarsnap.REMOVED, b'\0\1' +
                                             bytes(32)),
            (tarsnap.ARCHIVES, b'\0\1' + bytes(89)),
            (tarsnap.ERROR, b'\0\5no'), (tarsnap.AUTHOK, bytes(49)),
            (tarsnap.COMMITTED, bytes(48)), (tarsnap.BEGUN, bytes(80)),
            (tarsnap.STATEMENT, bytes(154)), (tarsnap.RECEIVED, bytes(8))]

    def pack(frames):
        return b''.join(struct.pack('>BH', kind, len(body)) + body
                        for kind, body in frames)

    opt = storefake.options()
    opt.cachedir = opt.expect_head = None
    channel = tarsnap.Channel.__new__(tarsnap.Channel)
    channel.server = 'there'

    def run(data):
        frames, at = [], 1
        while at + 3 <= len(data):
            kind, length = struct.unpack_from('>BH', data, at)
            frames.append((kind, data[at + 3:at + 3 + length]))
            at += 3 + length
        remote = Said(key, frames)
        for use in (
                lambda: list(tarsnap.history_changes(
                    remote, (0, bytes(32)))),
                lambda: tarsnap.history_live(remote, opt),
                lambda: tarsnap.history_at(remote, 1),
                lambda: client_reads(channel, key, frames)):
            with contextlib.suppress(*CLIENT):
                use()
    return [b'\0' + pack([one]) for one in said] + [
        b'\0' + pack(said[:3] * 2), b'\0' + pack([said[0], said[3]])], run


def client_reads(channel, key, frames):
    """The same frames through a Channel's own hands, as far as they go."""
    import collections
    import threading
    channel.changed = threading.Condition()
    channel.answers = {1: collections.deque()}
    channel.statement = channel.failed = None
    channel.unread, channel.received = set(), 0
    channel.waiting = channel.round_trips = channel.queued = 0
    channel.link = mock.Mock(cert_hash=bytes(32), transport=1)
    channel.wait_statement = lambda: channel.statement or b''
    buf = bytearray(b''.join(tarsnap.FRAME.pack(len(body), kind, 1) + body
                             for kind, body in frames))
    channel.parse(buf)
    with contextlib.suppress(*CLIENT):
        tarsnap.Statement(channel)
    for kind, body in frames:
        if kind == tarsnap.COMMITTED:
            tarsnap.commit_answer(body, b'', key)


##############################################################################
# The client: what its user gives it
##############################################################################


class OneProcess:
    """A Crew without workers: to fork them is most of the work."""

    def __init__(self, opt, key):
        self.sealer = tarsnap.Sealer(key)
        self.put, self.level, self.bytes = None, None, 0

    def add(self, cls, name, parts, *rest):
        self.put(self.sealer.seal(cls, name, parts), *rest)

    def wait(self, *_):
        pass

    finish = close = wait


class Run:
    """Runs the client in this process on a file that holds the case."""

    def __init__(self, *args, name='input'):
        self.top = tempfile.mkdtemp(prefix='fuzz-')
        self.path = os.path.join(self.top, name)
        self.args = [arg.replace('FILE', self.path) for arg in args]

    def __call__(self, data):
        with open(self.path, 'wb') as file:
            file.write(data)
        with mock.patch.object(tarsnap, 'crew_make', OneProcess):
            done = lab.run(['--no-default-config', *self.args])
        if 'Traceback' in done.err or done.status not in (0, 1):
            raise Found('%r' % done)
        return done


def tar_samples():
    """Tar files of every kind of member, format and compression."""
    import bz2
    import gzip
    import io
    import lzma
    import tarfile
    out = []
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT,
                 tarfile.USTAR_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode='w', format=form) as tar:
            for name, kind, size in (
                    ('f', b'0', 700), ('d', b'5', 0), ('s', b'2', 0),
                    ('h', b'1', 0), ('c', b'3', 0), ('p', b'6', 0),
                    ('n' * 90, b'0', 3)):
                info = tarfile.TarInfo(name)
                info.type, info.size = kind, size
                info.linkname = 'f' if kind in b'12' else ''
                if form == tarfile.PAX_FORMAT:
                    info.pax_headers = {
                        'mtime': '5.25', 'SCHILY.xattr.user.a': 'b',
                        'LIBARCHIVE.xattr.user.c': 'eHg='}
                tar.addfile(info, io.BytesIO(bytes(size)))
        data = file.getvalue().rstrip(b'\0')
        out.append(data + bytes(-len(data) % 512 + 1024))
    sparse = tarfile.TarInfo('sp')
    sparse.size = 10
    sparse.pax_headers = {'GNU.sparse.major': '0', 'GNU.sparse.minor': '1',
                          'GNU.sparse.size': '9000',
                          'GNU.sparse.map': '0,5,8990,5'}
    out.append(sparse.tobuf(tarfile.PAX_FORMAT) + b'x' * 10 + bytes(502)
               + bytes(1024))
    out += [gzip.compress(out[0]), bz2.compress(out[0]),
            lzma.compress(out[0])]
    return out


def cpio_samples():
    newc = odc = b''
    for number, (name, mode, data) in enumerate((
            (b'f', 0o100644, b'data'), (b'd', 0o40755, b''),
            (b's', 0o120777, b'f'), (b'TRAILER!!!', 0, b''))):
        one = b'070701' + b''.join(b'%08X' % x for x in (
            number, mode, 0, 0, 2, 9, len(data), 0, 0, 0, 0, len(name) + 1,
            0)) + name + b'\0'
        one += bytes(-len(one) % 4) + data
        newc += one + bytes(-len(one) % 4)
        odc += b'070707' + b'%06o' * 7 % (0, number, mode, 0, 0, 1, 0) \
            + b'%011o%06o%011o' % (9, len(name) + 1, len(data)) \
            + name + b'\0' + data
    return [newc, odc]


@target('tar', CLIENT)
def tar():
    run = Run('-c', '--dry-run', '-f', 'x', '@FILE')
    return tar_samples(), run


@target('cpio', CLIENT)
def cpio():
    run = Run('-c', '--dry-run', '-f', 'x', '@FILE')
    return cpio_samples(), run


@target('tar-pipe', CLIENT)
def tar_pipe():
    """The same through standard input, of which nothing is read twice."""
    run = Run('-c', '--dry-run', '-f', 'x', '@-')

    def piped(data):
        data = data[:60000]         # what a pipe holds
        r, w = os.pipe()
        os.write(w, data)
        os.close(w)
        saved = os.dup(0)
        os.dup2(r, 0)
        os.close(r)
        try:
            run(b'')
        finally:
            os.dup2(saved, 0)
            os.close(saved)
    return tar_samples() + cpio_samples(), piped


@target('tarsnap.conf', CLIENT)
def tarsnap_conf():
    top = tempfile.mkdtemp(prefix='fuzz-')
    path = os.path.join(top, 'conf')
    good = (b'# comment\nkeyfile ~/k\ncachedir /c\nexclude *.o\ninclude a\n'
            b'nodump\ncheckpoint-bytes 1G\nmaxbw-rate 1e6\nhumanize-numbers\n'
            b'no-aggressive-networking\nprint-stats\nlock-wait 5\n')

    def run(data):
        with open(path, 'wb') as file:
            file.write(data)
        for mode in ('-c', '-t'):
            parser = tarsnap.Parser([mode, '-f', 'x', '--no-default-config',
                                     '--configfile', path])
            with contextlib.suppress(*CLIENT), \
                    mock.patch.object(sys, 'stderr', open(os.devnull, 'w')):
                opt = parser.parse()
                parser.config_defaults()
                opt.finish()
    return [good, b'exclude a\r\n\tinclude b\r'], run


@target('options', CLIENT)
def options():
    words = [b'-c', b'-f', b'x', b'-C', b'/', b'--exclude', b'*.o', b'-v',
             b'--newer', b'2020-01-01', b'-s', b'/a/b/g', b'--keep-last',
             b'3', b'--checkpoint-bytes', b'1G', b'--maxbw-rate', b'1e5',
             b'--creationtime', b'0x12', b'--compress-level', b'3', b'@x',
             b'@@y', b'--verify-share', b'1.5%', b'--lock-wait', b'4']

    def run(data):
        argv = [os.fsdecode(word) for word in data.split(b'\0')]
        opt = tarsnap.Parser(argv).parse()
        opt.finish()
        if opt.letter:
            tarsnap.names_check(opt)
    return [b'\0'.join(words[at:at + 8]) for at in range(0, len(words), 4)
            ] + [b'xvf\0a\0b', b't\0-f\0x'], run


@target('lists', CLIENT)
def lists():
    """List files of -T and -X: names, and patterns tried on a short path."""
    good = b'a/b\n-C\nd\r\n*.o\n[a-z]*\n[!x]?\\*\n/abs\n./x/\n[[:alpha:]]\n'

    def run(data):
        null, data = data[:1] > b'\x7f', data[1:]
        with contextlib.suppress(*CLIENT):
            list(tarsnap.list_items(data, null))
        names = list(tarsnap.list_names(data, null))[:20]
        picked = tarsnap.Patterns(exclude=names[::2], include=names[1::2],
                                  operands=names[:3])
        for path in (b'a/b.o', b'/abs/x', b'x'):
            picked.selected(path)
        picked.unmatched(), picked.literals()
    return [b'\0' + good, b'\xff' + good.replace(b'\n', b'\0')], run


@target('rename', CLIENT)
def rename():
    def run(data):
        rule = tarsnap.Rule(tarsnap.path_text(data))
        tarsnap.Rename([rule])(b'a/b.o')
    return [b'/a/b/', b',\\(a*\\)/\\(b\\),\\2~\\1,g', b'/^[[:alpha:]]*$/x/rh',
            b'/a\\{1,3\\}/b/', b'/a\\|b/c/s', b'#[]x]#\\##'], run


@target('dates', CLIENT)
def dates():
    words = ('2026-11-23 04:05', '@1700000000.5', 'yesterday', 'now - 1 week',
             '3 days ago', '23 Nov 2026', 'last monday', '20261123T0405',
             '11/23/26 3pm CET', 'next month', '2026-11-23 04:05:06.7 +0130')

    def run(data):
        text = tarsnap.path_text(data)
        with contextlib.suppress(*CLIENT):
            tarsnap.date_parse(text)
        for parse in (tarsnap.size_parse, tarsnap.rate_parse,
                      tarsnap.integer_parse, tarsnap.share_parse,
                      tarsnap.command_parse, tarsnap.checkpoint_parse,
                      tarsnap.creation_parse, tarsnap.span_parse):
            with contextlib.suppress(*CLIENT):
                parse(text)
        tarsnap.series_of(data)
        tarsnap.head_text((1, data))
    return [word.encode() for word in words] + [
        b'12 GB', b'1e5', b'0x1f', b'12.5%', b'a=b', b'7d'], run


class Module:
    """What Lab wants of a test."""

    addCleanup = staticmethod(lambda *_: None)

    @staticmethod
    def assertEqual(a, b, *_):
        assert a == b, (a, b)


@target('cachedir', CLIENT)
def cachedir():
    """Files of the cache directory; a case names one in its first byte."""
    place = lab.Lab(Module)
    host = place.host()
    with open(os.path.join(place.tree, 'f'), 'wb') as file:
        file.write(b'x' * 5000)
    with mock.patch.object(tarsnap, 'RACY', 0):
        host.create('one')
    names = ('directory', 'cache', 'pending')
    good = {}
    for name in names:
        path = os.path.join(host.cache, name)
        if os.path.exists(path):
            with open(path, 'rb') as file:
                good[name] = file.read()

    def run(data):
        name = names[data[0] % 3 if data else 0]
        for other, content in good.items():
            with open(os.path.join(host.cache, other), 'wb') as file:
                file.write(content)
        with open(os.path.join(host.cache, name), 'wb') as file:
            file.write(data[1:])
        for args in (('--print-stats',),
                     ('-c', '--dry-run', '-f', 'y', '-C', place.tree, '.')):
            done = host.run(*args)
            if 'Traceback' in done.err or done.status not in (0, 1):
                raise Found('%r' % done)
    return [bytes([number]) + good.get(name, good['directory'])
            for number, name in enumerate(names)], run


@target('index', SERVER)
def index():
    """A server's index, which may be thrown away at any time."""
    requests = Requests(True)
    requests.renew()
    server, machine = requests.server, requests.host.machine
    server.run(tarsnapd.catch_up(machine))
    state = server.perform(('index', machine, 'state'))
    path = server.indexes.path(machine)
    server.indexes.close()
    with open(path, 'rb') as file:
        good = file.read()

    def run(data):
        server.indexes.close()
        for suffix in ('-wal', '-shm'):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path + suffix)
        with open(path, 'wb') as file:
            file.write(data)
        server.run(tarsnapd.catch_up(machine))
        server.perform(('index', machine, 'live', requests.names))
    del state
    return [good], run


##############################################################################
# Engines
##############################################################################


def alarm(*_):
    raise Hang('more than %d seconds' % LATE)


def memory_peak():
    """The most memory this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


class Case:
    """Runs cases of one target and judges them."""

    def __init__(self, name):
        make, self.allowed = TARGETS[name]
        self.name = name
        self.samples, self.run = make()
        gc.freeze()
        self.count = 0
        self.peak = memory_peak()
        self.found = []             # (error text, bytes)

    def __call__(self, data):
        """True if all is well."""
        self.count += 1
        signal.setitimer(signal.ITIMER_REAL, LATE)
        error = None
        try:
            self.run(data)
        except self.allowed:
            pass
        except (Exception, Hang, SystemExit) as e:
            error = '%s: %s%s' % (type(e).__name__, e, where(e))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        peak = memory_peak()
        if self.count > 50 and peak > self.peak + GROWTH:
            error = error or 'grew by %d MB' % ((peak - self.peak) >> 20)
        self.peak = peak
        if self.count % 256 == 0:
            gc.collect()            # the client collects seldom
        if error:
            self.found.append((error, data))
        return error is None


def where(error):
    """The innermost line of the programs that an exception came through."""
    import traceback
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if os.path.basename(frame.filename).startswith('tarsnap')]
    return ' (%s line %d)' % (frames[-1].name, frames[-1].lineno) \
        if frames else ''


def spoil(rng, all_samples):
    """One case: a sample, spoilt; sometimes crossed with another, or none."""
    base = rng.choice(all_samples)
    how = rng.randrange(20)
    if how == 0:
        return rng.randbytes(rng.randrange(300)) if hasattr(
            rng, 'randbytes') else os.urandom(40)
    if how == 1:
        return base[:rng.randrange(len(base) + 1)]
    if how == 2:
        other = rng.choice(all_samples)
        return base[:rng.randrange(len(base) + 1)] \
            + other[rng.randrange(len(other) + 1):]
    if how == 3 and base:
        at = rng.randrange(len(base))
        return base[:at] + base[at:at + 40] * rng.randrange(2, 30) \
            + base[at:]
    return next(samples.mutations(base, 1, rng.getrandbits(64)))


def hunt(name, seed, seconds, cases, engine, pipe):
    """Run one target in this process, and say what became of it."""
    signal.signal(signal.SIGALRM, alarm)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)    # warnings, by the million
    os.environ['TZ'] = 'UTC'
    case = Case(name)
    if sys.platform == 'linux' and engine != 'atheris':
        with open('/proc/self/statm') as file:
            most = int(file.read().split()[0]) * resource.getpagesize() + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    start = time.monotonic()
    for sample in case.samples:
        case(sample)
    if engine == 'atheris':
        guided(case, seed, seconds, cases)
    else:
        rng = random.Random('%s %s' % (seed, name))
        while (time.monotonic() < start + seconds if cases is None
               else case.count < cases) and len(case.found) < 5:
            case(spoil(rng, case.samples))
    pipe.send((case.count, time.monotonic() - start, case.found))
    pipe.close()


def guided(case, seed, seconds, cases):
    """Coverage-guided; forks, as the library ends its process."""
    import atheris
    with tempfile.TemporaryDirectory(prefix='corpus-') as corpus:
        for number, sample in enumerate(case.samples):
            with open(os.path.join(corpus, '%d' % number), 'wb') as file:
                file.write(sample)
        r, w = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(r)
            guided_child(atheris, case, seed, seconds, cases, corpus, w)
        os.close(w)
        with open(r, 'rb') as file:
            lines = file.read().split()
        os.waitpid(child, 0)
        for line in lines:
            case(bytes.fromhex(line.decode()[1:]))
        case.count += len(os.listdir(corpus)) if not lines else 0
        case.count = int(open(corpus + '.count').read())
        os.unlink(corpus + '.count')


def guided_child(atheris, case, seed, seconds, cases, corpus, w):
    """Run the engine; each finding is a line of hexadecimal to `w`."""
    for module in (tarsnap, tarsnapd):
        for value in list(vars(module).values()):
            if getattr(value, '__module__', None) == module.__name__ and \
                    not isinstance(value, type) and hasattr(
                        value, '__code__'):
                setattr(module, value.__name__,
                        atheris.instrument_func(value))

    def one(data):
        if not case(data):
            os.write(w, b'-' + data.hex().encode() + b'\n')
        if case.count % 256 == 0:
            with open(corpus + '.count', 'w') as file:
                file.write(str(case.count))

    with open(corpus + '.count', 'w') as file:
        file.write('0')
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    atheris.Setup(['fuzz', '-seed=%d' % (seed % 2 ** 31 + 1),
                   '-max_total_time=%d' % max(1, seconds),
                   '-runs=%d' % (-1 if cases is None else cases),
                   '-max_len=65536', '-timeout=60', '-rss_limit_mb=2048',
                   corpus], one)
    atheris.Fuzz()


@contextlib.contextmanager
def scratch():
    """What targets make, also in processes that are killed, is in one
    directory, which is removed at the end.
    """
    with tempfile.TemporaryDirectory(prefix='fuzz-') as top, \
            mock.patch.object(tempfile, 'tempdir', top):
        yield top


def fuzz(names, seed, seconds=None, cases=None, engine='mutation',
         say=print):
    """Run targets one after the other; [(target, error, bytes)] found."""
    with scratch():
        return fuzz_each(names, seed, seconds, cases, engine, say)


def fuzz_each(names, seed, seconds, cases, engine, say):
    everything = []
    total, spent = 0, 0.0
    for name in names:
        ours, theirs = multiprocessing.Pipe(False)
        child = multiprocessing.get_context('fork').Process(
            target=hunt, args=(name, seed, seconds, cases, engine, theirs))
        child.start()
        theirs.close()
        try:
            count, took, found = ours.recv()
        except EOFError:
            count, took = 0, 0.0
            found = [('its process died', b'')]
        child.join()
        total, spent = total + count, spent + took
        say('%-16s %9d cases %8.0f/s  %s' % (
            name, count, count / max(took, 1e-9),
            '%d found' % len(found) if found else ''))
        everything += [(name,) + one for one in found]
    say('%-16s %9d cases %8.0f/s  %d found' % (
        'all', total, total / max(spent, 1e-9), len(everything)))
    for name, error, data in everything:
        say('%s: %s\n    %s' % (name, error, data[:2000].hex()))
    return everything


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--seconds', type=float, default=60,
                        help='for each target')
    parser.add_argument('--cases', type=int, help='of each target instead')
    parser.add_argument('--seed', type=int,
                        default=random.SystemRandom().getrandbits(32))
    parser.add_argument('--target', action='append', choices=sorted(TARGETS))
    parser.add_argument('--engine', choices=('mutation', 'atheris'),
                        default='mutation')
    parser.add_argument('--list', action='store_true')
    args = parser.parse_args()
    if args.list:
        print('\n'.join(TARGETS))
        return 0
    print('SEED=%d' % args.seed, flush=True)
    return bool(fuzz(args.target or list(TARGETS), args.seed, args.seconds,
                     args.cases, args.engine,
                     lambda line: print(line, flush=True)))


if __name__ == '__main__':
    sys.exit(main())
