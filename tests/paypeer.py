# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Payment providers on loopback ports: two real doubles, and one of ours.

    Emulate      npm's emulate: Stripe's Checkout with its page, signed
                 webhooks; neither refunds nor amounts
    LocalStripe  PyPI's localstripe: payments, refunds, signed webhooks; no
                 Checkout
    Fake         what neither has: both providers, with idempotency keys,
                 disputes, lists of events, captures that fail and answers
                 that get lost

The first two are installed beside the sources (installed.py).  Fake knows who
was charged how much: charged() is what a ledger must come to.
"""

import base64
import collections
import contextlib
import datetime
import hashlib
import hmac
import http.client
import http.server
import io
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.parse
import urllib.request
import zlib

import installed
import s3peers

PACKAGE = 'localstripe==1.15.10'
SECRET = 'whsec_test'
KEYS = '''\
[stripe]
secret-key = sk_test_123
webhook-secret = whsec_new {secret}
price = {price}
api = {stripe}
page = {page}
[paypal]
client-id = client
client-secret = secret
webhook-id = {webhook}
api = {paypal}
page = {paypal}
'''


STRIPE_KEYS = '''\
[stripe]
secret-key = sk_test_123
webhook-secret = %s
price = %s
api = %s
page = %s
'''


class Double:
    """A program that serves an API at `url`; ended by `cleanup`."""

    def __init__(self, cleanup):
        self.port, = s3peers.free_ports(1)
        self.url = 'http://127.0.0.1:%d' % self.port
        self.root = tempfile.mkdtemp(prefix='pay-')
        cleanup(shutil.rmtree, self.root, True)
        with open(os.path.join(self.root, 'log'), 'wb') as log:
            self.child = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, cwd=self.root)
        cleanup(self.close)
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(('127.0.0.1', self.port)).close()
                return
            except OSError:
                if time.monotonic() > end or self.child.poll() is not None:
                    raise AssertionError('no %s: %s' % (
                        type(self).__name__, self.log())) from None
                time.sleep(0.05)

    def log(self):
        with open(os.path.join(self.root, 'log'), errors='replace') as file:
            return file.read()[-2000:]

    def close(self):
        self.child.kill()
        self.child.wait()

    def call(self, method, path, form=()):
        """What it answers to its key, from JSON."""
        data = urllib.parse.urlencode(form).encode() if form else None
        request = urllib.request.Request(self.url + path, data, {
            'Authorization': 'Bearer sk_test_123'}, method=method)
        with urllib.request.urlopen(request, timeout=20) as answer:
            text = answer.read()
        return json.loads(text) if text[:1] in (b'{', b'[') else text


class Emulate(Double):
    """Stripe as emulate has it; its webhooks go to `hook`."""

    def __init__(self, cleanup, hook):
        self.hook = hook
        super().__init__(cleanup)

    def command(self):
        with open(os.path.join(self.root, 'seed.yaml'), 'w') as file:
            file.write('stripe:\n  webhooks:\n    - url: %s\n'
                       "      events: ['*']\n      secret: %s\n"
                       % (self.hook, SECRET))
        return ['node', installed.emulate(), 'start', '--service', 'stripe',
                '--port', str(self.port), '--seed', 'seed.yaml']

    def keys(self, *places):
        """Write pay.keys for us into each (directory, user)."""
        product = self.call('POST', '/v1/products', {'name': 'Backup'})['id']
        price = self.call('POST', '/v1/prices', {
            'product': product, 'currency': 'usd', 'unit_amount': 100})['id']
        for directory, user in places:
            keys_write(os.path.join(directory, 'pay.keys'), user, STRIPE_KEYS
                       % (SECRET, price, self.url, self.page))

    @property
    def page(self):
        """What it calls itself."""
        return self.url.replace('127.0.0.1', 'localhost')

    def pay(self, url):
        """Press the button of the page at `url`; where it leads then."""
        connection = http.client.HTTPConnection('127.0.0.1', self.port)
        try:
            connection.request('POST', urllib.parse.urlsplit(url).path
                               + '/complete')
            return connection.getresponse().getheader('Location')
        finally:
            connection.close()


class LocalStripe(Double):
    """Stripe as localstripe has it."""

    def command(self):
        return [os.path.join(installed.pip('pay', PACKAGE), 'localstripe'),
                '--from-scratch', '--port', str(self.port)]

    def hook(self, url):
        """Have its webhooks go there."""
        self.call('POST', '/_config/webhooks/one', {
            'url': url, 'secret': SECRET})

    def paid(self, name, cents):
        """A payment of a checkout of that name, as Checkout makes it: the id
        of its intent.
        """
        method = self.call('POST', '/v1/payment_methods', {
            'type': 'card', 'card[number]': '4242424242424242',
            'card[exp_month]': '12', 'card[exp_year]': '2040',
            'card[cvc]': '123'})
        return self.call('POST', '/v1/payment_intents', {
            'amount': cents, 'currency': 'usd', 'payment_method': method['id'],
            'confirm': 'true', 'metadata[checkout]': name})['id']


def keys_write(file, user, text):
    """A file that nobody but a user can read."""
    with open(file, 'w', opener=lambda name, flags: os.open(
            name, flags, 0o600)) as out:
        out.write(text)
    os.chmod(file, 0o600)
    os.chown(file, user, -1)


def serve(cleanup, handler):
    """The URL of a server with that handler, in threads."""
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever,
                              kwargs={'poll_interval': 0.05})
    thread.start()
    cleanup(thread.join)
    cleanup(server.server_close)
    cleanup(server.shutdown)
    return 'http://127.0.0.1:%d' % server.server_port


class Hooks:
    """A server that takes webhooks down: (headers, body) in `came`."""

    def __init__(self, cleanup):
        hooks = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers['Content-Length']))
                with hooks.arrived:
                    hooks.came.append(({
                        name.upper(): value for name, value
                        in self.headers.items()}, body))
                    hooks.arrived.notify_all()
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args):
                pass

        self.came = []
        self.arrived = threading.Condition()
        self.url = serve(cleanup, Handler) + '/'

    def wait(self, kind):
        """The first one that came of an event of that type."""
        with self.arrived:
            def found():
                return [one for one in self.came
                        if json.loads(one[1]).get('type') == kind]
            if not self.arrived.wait_for(found, 20):
                raise AssertionError('no webhook %s' % kind)
            return found()[0]


class Wrong(Exception):
    """An answer that is no success: status and JSON."""

    def __init__(self, status, answer):
        super().__init__(status, answer)
        self.status = status
        self.answer = answer


class Fake:
    """Both providers.  `plan(number, method, path)` says what becomes of each
    request, counted from 1: None for what should, or

        500 409 400 ...     an answer of that status; nothing is done
        (500, 'false')      the same, with Stripe-Should-Retry
        'lost'      it is done, and the connection ends without an answer
        'reset'     the connection ends; nothing is done
        'hang'      it is done, and nobody says so
        'torn'      it is done, and half of the answer comes
    """

    WEBHOOK = '1JE4291016473214C'
    PRICE = 'price_1'

    def __init__(self, cleanup):
        self.lock = threading.RLock()
        self.key, self.certificate = paypal_certificate()
        self.reset()
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def do_GET(self):
                fake.serve(self)

            do_POST = do_GET

            def log_message(self, *args):
                pass

        self.url = serve(cleanup, Handler)

    def keys(self, file, user=-1, **values):
        """Write a file of keys for us, with other `values`."""
        values = {'price': self.PRICE, 'secret': SECRET, 'page': self.url,
                  'webhook': self.WEBHOOK, 'stripe': self.url,
                  'paypal': self.url, **values}
        keys_write(file, user, KEYS.format(**values))

    def reset(self):
        with self.lock:
            self.count = 0
            self.seen = []              # (method, path, headers, form)
            self.plan = lambda *_: None
            self.names = 0
            self.things = {}            # id -> dict, of both
            self.things[self.PRICE] = {'id': self.PRICE, 'object': 'price',
                                       'unit_amount': 100, 'currency': 'usd'}
            self.kept = {}              # idempotency key -> (form, answer)
            self.events = {'stripe': [], 'paypal': []}      # oldest first
            self.tokens = set()
            self.funds = True           # cards that are captured have them

    def name(self, prefix):
        """A new id; not the same in two tests."""
        self.names += 1
        return '%s%d%s' % (prefix, self.names, os.urandom(4).hex().upper())

    # HTTP.

    def serve(self, handler):
        data = handler.rfile.read(int(handler.headers.get('Content-Length')
                                      or 0))
        handler.close_connection = True
        fate, status, body = self.respond(
            handler.command, handler.path, data, handler.headers)
        if fate == 'hang':              # until the client has enough of it
            handler.connection.recv(1)
        if fate in ('reset', 'lost', 'hang'):
            return
        with contextlib.suppress(ConnectionError):      # killed, perhaps
            handler.send_response(status)
            handler.send_header('Content-Length', str(len(body)))
            handler.send_header('Location', self.url)
            if isinstance(fate, tuple):
                handler.send_header('Stripe-Should-Retry', fate[1])
            handler.end_headers()
            handler.wfile.write(body[:len(body) // 2] if fate == 'torn'
                                else body)

    def respond(self, method, url, data, headers):
        """(fate, status, body) of a request."""
        path, _, query = url.partition('?')
        with self.lock:
            self.count += 1
            fate = self.plan(self.count, method, url)
            if fate == 'reset':
                return fate, 0, b''
            try:
                if isinstance(fate, (int, tuple)):
                    raise Wrong(fate[0] if isinstance(fate, tuple) else fate,
                                {'error': {'message': 'planned'}})
                answer, status = self.answer(
                    method, path, dict(urllib.parse.parse_qsl(query)), data,
                    headers), 200
            except Wrong as e:
                answer, status = e.answer, e.status
            return fate, status, answer if isinstance(
                answer, bytes) else json.dumps(answer).encode()

    def direct(self, provider, method, path, data, headers):
        """Provider._once() without a network, for very many of them."""
        import tarsnapd
        headers = http.client.parse_headers(io.BytesIO(''.join(
            '%s: %s\r\n' % pair for pair in headers.items()).encode()
            + b'\r\n'))
        fate, status, body = self.respond(method, path, data, headers)
        if fate in ('reset', 'lost'):
            raise tarsnapd.ProviderError('no answer', 0, True)
        if status != 200:
            raise tarsnapd.ProviderError('planned', status, status >= 500)
        return body

    def answer(self, method, path, query, data, headers):
        """What is said to a request."""
        if path.startswith('/v1/notifications/certs/'):
            return self.certificate
        if path == '/v1/oauth2/token':
            if headers['Authorization'] != 'Basic ' + base64.b64encode(
                    b'client:secret').decode():
                raise Wrong(401, {'error': 'invalid_client'})
            token = self.name('TOKEN')
            self.tokens.add(token)
            return {'access_token': token, 'expires_in': 32400}
        kind, _, word = headers['Authorization'].partition(' ')
        if kind == 'Basic':
            if base64.b64decode(word) != b'sk_test_123:' or not (
                    headers['Stripe-Version']):
                raise Wrong(401, {'error': {'message': 'no key'}})
            form = dict(urllib.parse.parse_qsl((data or b'').decode()))
            serve, key = self.stripe, headers['Idempotency-Key']
        else:
            if word not in self.tokens:
                raise Wrong(401, {'name': 'AUTHENTICATION_FAILURE'})
            form = json.loads(data) if data else {}
            serve, key = self.paypal, headers['PayPal-Request-Id']
        self.seen.append((method, path, dict(headers), form or query))
        if method == 'GET':
            return serve(method, path, query)
        if not key or len(key) > 108:
            raise AssertionError('a POST with the key %r' % key)
        if key in self.kept:
            if self.kept[key][0] != (path, form):
                raise Wrong(400, {'error': {'code': 'idempotency_error'}})
            if isinstance(self.kept[key][1], Wrong):
                raise self.kept[key][1]
            return self.kept[key][1]
        try:
            answer = serve(method, path, form)
        except Wrong as e:
            self.kept[key] = (path, form), e
            raise
        self.kept[key] = (path, form), json.loads(json.dumps(answer))
        return answer

    def need(self, ident):
        if ident not in self.things:
            raise Wrong(404, {'name': 'RESOURCE_NOT_FOUND', 'error': {
                'code': 'resource_missing', 'message': 'No such thing'}})
        return self.things[ident]

    def under(self, kind, **values):
        """Things of a kind with these values, the newest first."""
        return [x for x in reversed(list(self.things.values()))
                if x['object'] == kind
                and all(x.get(k) == v for k, v in values.items())]

    # Stripe.

    def stripe(self, method, path, form):
        _, _, *place = path.split('/')
        ident = place[-1]
        if (method, place) == ('POST', ['products']):
            return self.make('product', 'prod_', name=form['name'])
        if (method, place) == ('POST', ['prices']):
            assert form['product'] in self.things
            return self.make('price', 'price_', currency=form['currency'],
                             unit_amount=int(form['unit_amount']),
                             lookup_key=form.get('lookup_key'))
        if (method, place) == ('POST', ['checkout', 'sessions']):
            return self.stripe_session(form)
        if place in (['prices'], ['refunds'], ['disputes']):
            values = {'lookup_key': form['lookup_keys[]']} if (
                place == ['prices']) else {
                    'payment_intent': form['payment_intent']}
            return self.page(self.under(place[0][:-1], **values), form)
        if place == ['events']:
            return self.page([x for x in reversed(self.events['stripe'])
                              if x['created'] >= int(form['created[gte]'])],
                             form)
        thing = dict(self.need(ident))
        if form.get('expand[]') == 'payment_intent':
            thing['payment_intent'] = self.things.get(
                thing['payment_intent'], thing['payment_intent'])
        return thing

    def page(self, found, form):
        """A page of a list; of two, so that there are several."""
        after = form.get('starting_after')
        if after:
            found = found[[x['id'] for x in found].index(after) + 1:]
        assert form['limit'] == '100'
        return {'object': 'list', 'data': found[:2],
                'has_more': len(found) > 2}

    def make(self, kind, prefix, **values):
        thing = dict(values, id=self.name(prefix), object=kind)
        self.things[thing['id']] = thing
        return thing

    def stripe_session(self, form):
        price = self.things[form['line_items[0][price]']]
        assert form['mode'] == 'payment'
        assert form['metadata[checkout]'] == form[
            'payment_intent_data[metadata][checkout]']
        assert 1800 <= int(form['expires_at']) - time.time() < 86400
        session = self.make(
            'checkout.session', 'cs_test_', status='open',
            payment_status='unpaid', payment_intent=None,
            amount_total=price['unit_amount'] * int(
                form['line_items[0][quantity]']),
            currency=price['currency'],
            client_reference_id=form['client_reference_id'],
            metadata={'checkout': form['metadata[checkout]']},
            success_url=form['success_url'])
        session['url'] = '%s/pay/%s' % (self.url, session['id'])
        return session

    def stripe_event(self, kind, thing):
        event = {'id': self.name('evt_'), 'object': 'event', 'type': kind,
                 'created': int(time.time()),
                 'data': {'object': json.loads(json.dumps(thing))}}
        self.events['stripe'].append(event)
        return event

    def stripe_pay(self, ident, later=False, **values):
        """The payer pays, at once or by a transfer that takes days."""
        with self.lock:
            session = self.things[ident]
            assert session['status'] == 'open', session
            intent = self.make(
                'payment_intent', 'pi_', metadata=session['metadata'],
                status='processing' if later else 'succeeded')
            session.update(status='complete', payment_intent=intent['id'],
                           payment_status='unpaid' if later else 'paid',
                           **values)
            return self.stripe_event('checkout.session.completed', session)

    def stripe_arrives(self, ident, good=True):
        """The transfer arrives, or fails."""
        with self.lock:
            session = self.things[ident]
            self.things[session['payment_intent']]['status'] = (
                'succeeded' if good else 'requires_payment_method')
            if good:
                session['payment_status'] = 'paid'
            return self.stripe_event(
                'checkout.session.async_payment_'
                + ('succeeded' if good else 'failed'), session)

    def stripe_expire(self, ident):
        with self.lock:
            self.things[ident]['status'] = 'expired'
            return self.stripe_event('checkout.session.expired',
                                     self.things[ident])

    def stripe_refund(self, ident, cents):
        with self.lock:
            refund = self.make(
                'refund', 're_', amount=cents, currency='usd',
                payment_intent=self.things[ident]['payment_intent'],
                status='succeeded')
            self.stripe_event('refund.created', refund)
            return self.stripe_event('charge.refunded', {
                'object': 'charge', 'id': 'ch_1',
                'payment_intent': refund['payment_intent']})

    def stripe_refund_fails(self, event):
        with self.lock:
            refund, = self.under('refund', payment_intent=event['data'][
                'object']['payment_intent'])[:1]
            refund['status'] = 'failed'
            return self.stripe_event('refund.failed', refund)

    def stripe_dispute(self, ident, cents, status='needs_response'):
        with self.lock:
            dispute = self.make(
                'dispute', 'du_', amount=cents, currency='usd', status=status,
                payment_intent=self.things[ident]['payment_intent'])
            return self.stripe_event('charge.dispute.created', dispute)

    def stripe_closed(self, event, status):
        with self.lock:
            dispute = self.things[event['data']['object']['id']]
            dispute['status'] = status
            return self.stripe_event('charge.dispute.closed', dispute)

    def stripe_left(self, ident):
        """Cents of a payment that can still be taken back."""
        with self.lock:
            session = self.things[ident]
            return session['amount_total'] - sum(
                x['amount'] for x in self.under('refund') + self.under(
                    'dispute')
                if x.get('payment_intent') == session['payment_intent']
                and x['status'] not in ('failed', 'won'))

    # PayPal.

    def paypal(self, method, path, form):
        place = path.split('/')
        if (method, path) == ('POST', '/v2/checkout/orders'):
            return self.paypal_order(form)
        if path == '/v1/notifications/webhooks-events':
            return self.paypal_events(form)
        if path == '/v1/customer/disputes':
            return {'items': self.under(
                'dispute', capture=form['disputed_transaction_id'])}
        if path.startswith('/v1/notifications/webhooks-events/'):
            found = [x for x in self.events['paypal'] if x['id'] == place[-1]]
            return found[0] if found else self.need('')
        if place[-1] == 'capture':
            return self.paypal_capture(self.need(place[-2]))
        return self.need(place[-1])

    def paypal_events(self, form):
        assert form['start_time'] < form['end_time']
        start = int(form.get('at', 0))
        found = list(reversed(self.events['paypal']))
        links = [{'rel': 'self', 'href': 'https://api.paypal.com/'}]
        if len(found) > start + 2:
            links.append({'rel': 'next', 'href': (
                'https://api.paypal.com/v1/notifications/webhooks-events?'
                'start_time=%s&end_time=%s&at=%d' % (
                    form['start_time'], form['end_time'], start + 2))})
        return {'events': found[start:start + 2], 'links': links}

    def paypal_order(self, form):
        assert form['intent'] == 'CAPTURE'
        unit, = form['purchase_units']
        assert re.fullmatch(r'\d+\.\d\d', unit['amount']['value'])
        assert len(unit['custom_id']) <= 127
        assert 'return_url' in form['payment_source']['paypal'][
            'experience_context']
        order = self.make('order', 'ORDER', status='PAYER_ACTION_REQUIRED',
                          purchase_units=[unit], update_time='1')
        order['links'] = [
            {'rel': 'self', 'href': self.url + '/v2/checkout/orders/'
             + order['id']},
            {'rel': 'payer-action', 'href': self.url + '/checkoutnow?token='
             + order['id']}]
        return order

    def paypal_capture(self, order):
        if order['status'] != 'APPROVED':
            raise Wrong(422, {'name': 'UNPROCESSABLE_ENTITY', 'details': [
                {'issue': 'ORDER_ALREADY_CAPTURED' if order['status']
                 == 'COMPLETED' else 'ORDER_NOT_APPROVED'}]})
        if not self.funds:
            raise Wrong(422, {'name': 'UNPROCESSABLE_ENTITY', 'details': [
                {'issue': 'INSTRUMENT_DECLINED'}]})
        order['status'] = 'COMPLETED'
        unit = order['purchase_units'][0]
        capture = self.make(
            'capture', 'CAPTURE', status=self.captured,
            amount=dict(unit['amount'], **self.amount),
            custom_id=unit['custom_id'],
            supplementary_data={'related_ids': {'order_id': order['id']}})
        unit['payments'] = {'captures': [capture]}
        self.paypal_event('PAYMENT.CAPTURE.' + self.captured, capture)
        return order

    captured = 'COMPLETED'          # what a capture comes to
    amount = {}                     # what is another in it

    def paypal_event(self, kind, thing):
        event = {'id': self.name('WH-'), 'event_type': kind,
                 'create_time': datetime.datetime.now(
                     datetime.timezone.utc).isoformat(),
                 'resource': json.loads(json.dumps(thing))}
        self.events['paypal'].append(event)
        return event

    def paypal_approve(self, ident):
        with self.lock:
            order = self.things[ident]
            order['status'] = 'APPROVED'
            order['update_time'] += '1'
            return self.paypal_event('CHECKOUT.ORDER.APPROVED', order)

    def paypal_arrives(self, ident):
        """A capture that was pending is complete."""
        with self.lock:
            capture = self.things[ident]['purchase_units'][0]['payments'][
                'captures'][0]
            capture['status'] = 'COMPLETED'
            return self.paypal_event('PAYMENT.CAPTURE.COMPLETED', capture)

    def paypal_refund(self, ident, value, kind='REFUNDED', listed=True):
        """Money is taken back; `listed` also where the order says so."""
        with self.lock:
            payments = self.things[ident]['purchase_units'][0]['payments']
            capture = payments['captures'][0]
            refund = self.make('refund', 'REFUND', status='COMPLETED', amount={
                'currency_code': 'USD', 'value': value}, links=[{
                    'rel': 'up', 'href': self.url + '/v2/payments/captures/'
                    + capture['id']}], capture=capture['id'])
            if listed:
                payments.setdefault('refunds', []).append(refund)
                capture['status'] = 'PARTIALLY_REFUNDED' if (
                    value != capture['amount']['value']) else 'REFUNDED'
            return self.paypal_event('PAYMENT.CAPTURE.' + kind, refund)

    def paypal_left(self, order):
        """Cents of an order that can still be taken back."""
        with self.lock:
            payments = order['purchase_units'][0].get('payments')
            if not payments:
                return 0
            capture = payments['captures'][0]
            return cents(capture['amount']['value']) - sum(
                cents(x['amount']['value']) for x in self.under(
                    'refund', capture=capture['id']))

    def paypal_dispute(self, ident, outcome=None, value=None):
        """An order's capture is disputed, or even to the end."""
        with self.lock:
            capture = self.things[ident]['purchase_units'][0]['payments'][
                'captures'][0]
            dispute = self.make(
                'dispute', 'PP-D-', capture=capture['id'], status='OPEN',
                disputed_transactions=[{
                    'seller_transaction_id': capture['id']}])
            dispute['dispute_id'] = dispute['id']
            if value:
                dispute['dispute_amount'] = {'currency_code': 'USD',
                                             'value': value}
            if outcome:
                return self.paypal_resolve(dispute['id'], outcome)
            return self.paypal_event('CUSTOMER.DISPUTE.CREATED', dispute)

    def paypal_resolve(self, ident, outcome):
        """A dispute ends."""
        with self.lock:
            dispute = self.things[ident]
            dispute['status'] = 'RESOLVED'
            dispute['dispute_outcome'] = {'outcome_code': outcome}
            return self.paypal_event('CUSTOMER.DISPUTE.RESOLVED', dispute)

    # Webhooks.

    def hook(self, event, when=None, secret=SECRET, webhook=WEBHOOK):
        """(headers, body) of a webhook that says `event`, well signed."""
        body = json.dumps(event, indent=1).encode()
        if 'event_type' not in event:
            return {'STRIPE-SIGNATURE': stripe_signature(
                body, when or int(time.time()), secret)}, body
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import padding
        text = 'id-1|2026-11-26T00:00:00Z|%s|%d' % (webhook, zlib.crc32(body))
        return {
            'PAYPAL-TRANSMISSION-ID': 'id-1',
            'PAYPAL-TRANSMISSION-TIME': '2026-11-26T00:00:00Z',
            'PAYPAL-AUTH-ALGO': 'SHA256withRSA',
            'PAYPAL-CERT-URL': self.url + '/v1/notifications/certs/CERT-1',
            'PAYPAL-TRANSMISSION-SIG': base64.b64encode(self.key.sign(
                text.encode(), padding.PKCS1v15(), hashes.SHA256())).decode(),
        }, body

    # What it comes to.

    def charged(self):
        """{account: cents} that were paid and not taken back."""
        with self.lock:
            sums = collections.Counter()
            for session in self.under('checkout.session',
                                      payment_status='paid'):
                account = session['metadata']['checkout'][:16]
                intent = session['payment_intent']
                sums[account] += session['amount_total']
                sums[account] -= sum(
                    x['amount'] for x in self.under('refund')
                    if x.get('payment_intent') == intent
                    and x['status'] != 'failed')
                sums[account] -= sum(
                    x['amount'] for x in self.under('dispute')
                    if x.get('payment_intent') == intent
                    and x['status'] in ('needs_response', 'lost'))
            for capture in self.under('capture'):
                if capture['status'] in ('PENDING', 'DECLINED'):
                    continue
                account = capture['custom_id'][:16]
                sums[account] += cents(capture['amount']['value'])
                sums[account] -= sum(
                    cents(x['amount']['value']) for x in self.under(
                        'refund', capture=capture['id']))
            return dict(sums)


class Answers:
    """Answers of an API, JSON in bytes, one after the other."""

    def __init__(self, lines):
        self.lines = list(lines)

    def next(self):
        """A dict; tarsnapd.ProviderError for what is none."""
        import tarsnapd
        try:
            answer = json.loads(self.lines.pop(0))
        except (ValueError, RecursionError, IndexError):
            answer = None
        if not isinstance(answer, dict):
            raise tarsnapd.ProviderError('no answer', 404)
        return answer


def drive(steps, store, answers):
    """Carry out steps over a dict of objects and Answers."""
    import tarsnapd

    def perform(wish):
        if wish == ('now',):
            return 1700000000
        verb, key, *rest = wish
        if verb == 'provider':
            return answers.next()
        if verb == 'all':
            return [perform(one) for one in key]
        if verb == 'list':
            return sorted(x for x in store if x.startswith(key))
        if verb == 'put':
            return store.setdefault(key, rest[0]) is rest[0]
        if verb == 'delete':
            return store.pop(key, None)
        if key not in store:
            raise tarsnapd.NoObject(verb, key)
        return store[key]

    tarsnapd.carry_out(steps, perform)


def cents(text):
    return int(text.replace('.', ''))


def stripe_signature(body, when, secret):
    return 't=%d,v1=%s' % (when, hmac.new(
        secret.encode(), b'%d.' % when + body, hashlib.sha256).hexdigest())


def paypal_certificate(name='messageverificationcerts.paypal.com',
                       days=(-1, 365)):
    """(key, PEM) such as PayPal signs webhooks with."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives import serialization as ser
    from cryptography.hazmat.primitives.asymmetric import rsa
    key = rsa.generate_private_key(65537, 2048)
    subject = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME,
                                            name)])
    today = datetime.datetime.utcnow()
    start, end = (today + datetime.timedelta(days=n) for n in days)
    return key, x509.CertificateBuilder(
        subject, subject, key.public_key(), 1, start, end).sign(
            key, hashes.SHA256()).public_bytes(ser.Encoding.PEM)
