# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""web: what the account pages have in common.

A page is a CGI script of a few lines that calls serve() with what it answers
to GET and to POST:

    Apache -> script -> serve(): the request, bounded; the session; the token
           -> get(site) or post(site) -> Answer -> headers and body

A script never prints, never looks at the environment and never makes HTML
but by h(), which escapes all that it fills in.  `site` is what it works with:
who asks, what for, and run(), which carries out steps of tarsnapd.py over the
store of accounts and nothing else: this process can read no block and no key.

Everything is in the directory that TARSNAP_WEB names; tarsnap-web(8).
"""

import os
import sys

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import tarsnapd                                             # noqa: E402
from tarsnapd import ServerError, StoreError, printable     # noqa: E402

OPTIONS = {'accounts', 'server', 'notice', 's3-endpoint', 's3-region',
           's3-addressing', 's3-profile', 's3-access-key', 's3-secret-key',
           's3-session-token', 's3-checksum', 's3-ca-bundle',
           'pay-keys', 'pay-first', 'pay-least', 'pay-most'}

# What a request may have; bytes, unless the name says otherwise.
MOST = {'body': 65536, 'query': 4096, 'cookies': 8192, 'fields': 64,
        'field': 4096}
SESSION_SECONDS = 12 * 3600
SESSIONS = 20                   # of one account; the oldest goes
PASSWORD = (8, 1024)            # characters at least, bytes at most

##############################################################################
# HTML
#
# One function makes it, and it escapes what is put in.
##############################################################################


class Html(str):
    """Text that is HTML already; only h() and join() make it."""


ESCAPES = {ord(c): '&#%d;' % ord(c) for c in '&<>"\''}


def escape(value):
    """A value as it may stand in HTML, also in a quoted attribute.

    What would not be seen, or turns text around, becomes a question mark.
    """
    if isinstance(value, Html):
        return value
    text = str(value)
    if not text.isprintable():
        text = printable(text)
    return text.translate(ESCAPES)


def h(template, *values):
    """Html from a template, with `{}` for each of `values`, escaped."""
    return Html(template.format(*map(escape, values)))


def join(parts):
    """Html of several; what is no Html is escaped."""
    return Html(''.join(map(escape, parts)))


def table(heads, rows, caption='', numbers=()):
    """A table; columns of which the number is in `numbers` are to the
    right.
    """
    right = [Html(' class="n"') if i in numbers else ''
             for i in range(len(heads))]
    return h('<div class="wide" tabindex="0"><table>{}'
             '<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>',
             h('<caption>{}</caption>', caption) if caption else '',
             join(h('<th scope="col"{}>{}</th>', side, head)
                  for side, head in zip(right, heads)),
             join(h('<tr>{}</tr>', join(
                 h('<td{}>{}</td>', side, cell)
                 for side, cell in zip(right, row))) for row in rows))


def field(label, name, kind='text', complete='off', note='', more='',
          ident=''):
    """A labelled input.  `complete` is for browsers' memory, `more` Html,
    `ident` its id where a page has several of that name.
    """
    ident = ident or name
    if note:
        more = join((more, h(' aria-describedby="{}-note"', ident)))
        note = h('<small id="{}-note">{}</small>', ident, note)
    return h('<p><label for="{}">{}</label><input id="{}" name="{}" '
             'type="{}" autocomplete="{}" required {}>{}</p>', ident, label,
             ident, name, kind, complete, more, note)


def form(site, action, *parts, button, kind='plain', hidden=()):
    """A form that posts to `action`, with the token that proves it is ours.
    """
    inputs = join(h('<input type="hidden" name="{}" value="{}">', *pair)
                  for pair in (('token', site.token()), *hidden))
    return h('<form method="post" action="{}" class="{}">{}{}'
             '<p><button type="submit">{}</button></p></form>', action, kind,
             inputs, join(parts), button)


def owner(address):
    """Whose password a form is about, for browsers that remember them."""
    return h('<input type="text" value="{}" autocomplete="username" hidden>',
             address)


def password_fields(address):
    """Inputs for a new password of `address`, twice."""
    note = 'At least %d characters.' % PASSWORD[0]
    return join((
        owner(address),
        field('New password', 'new', 'password', complete='new-password',
              note=note, more=Html('minlength="%d"' % PASSWORD[0])),
        field('Once more', 'again', 'password', complete='new-password')))


def para(text, *values):
    return h('<p>' + text + '</p>', *values)


##############################################################################
# Answers
##############################################################################

HEADERS = [
    ('X-Content-Type-Options', 'nosniff'),
    ('X-Frame-Options', 'DENY'),
    ('Referrer-Policy', 'no-referrer'),
    ('Cross-Origin-Opener-Policy', 'same-origin'),
    ('Cross-Origin-Resource-Policy', 'same-origin'),
    ('Permissions-Policy', 'camera=(), geolocation=(), microphone=()'),
    ('Cache-Control', 'no-store')]
POLICY = ("default-src 'none'; style-src 'self'; img-src 'self'; "
          "form-action 'self'%s; frame-ancestors 'none'; base-uri 'none'")


class Answer:
    """What goes back: status, headers, body.

    `forms` are origins that a form's answer may lead to, besides our own.
    """

    def __init__(self, body, kind='text/html; charset=utf-8',
                 status='200 OK', headers=(), forms=()):
        self.body = body.encode('utf-8') if isinstance(body, str) else body
        self.status = status
        self.headers = [('Content-Type', kind), *headers]
        self.forms = forms

    def send(self, https, head=False):
        """Write it to standard output, as CGI has it."""
        policy = POLICY % ''.join(' ' + origin for origin in self.forms)
        headers = [('Status', self.status), *self.headers, *HEADERS,
                   ('Content-Security-Policy', policy)]
        if https:
            headers.append(('Strict-Transport-Security',
                            'max-age=31536000'))
        lines = ['%s: %s\r\n' % header for header in headers]
        assert not any('\n' in line[:-2] for line in lines), lines
        out = sys.stdout.buffer
        out.write(''.join(lines).encode('ascii') + b'\r\n')
        if not head:
            out.write(self.body)
        out.flush()


class Problem(Exception):
    """What cannot be done, for whoever asked: a page of its own."""

    def __init__(self, status, title, text):
        super().__init__(text)
        self.status = status
        self.title = title


def bad(text):
    return Problem('400 Bad Request', 'That was not understood', text)


def redirect(where, headers=()):
    """Go to one of our own pages, by its name; after a POST, too."""
    return Answer('', status='303 See Other',
                  headers=[('Location', where), *headers])


MENU = [('manage.cgi', 'Overview'), ('activity.cgi', 'Activity'),
        ('pay.cgi', 'Add money'), ('payments.cgi', 'Payments'),
        ('settings.cgi', 'Settings')]


def page(site, title, *parts, status='200 OK', headers=(), forms=()):
    """An Answer: a whole page with this title and these parts."""
    menu = [h('<a href="./">{}</a>', site.service)]
    if site.account:
        menu += [h('<a href="{}"{}>{}</a>', name, Html(
            ' aria-current="page"') if name == site.script else '', label)
            for name, label in MENU
            if name != 'pay.cgi' or site.can_pay()]
        menu.append(form(site, 'logout.cgi', kind='quiet',
                         button='Log out'))
    else:
        menu += [h('<a href="account.html">Log in</a>'),
                 h('<a href="register.cgi">Register</a>')]
    body = h(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<title>{} – {}</title><meta name="viewport" '
        'content="width=device-width, initial-scale=1"><meta '
        'name="color-scheme" content="light dark">'
        '<link rel="icon" type="image/svg+xml" href="icon.svg">'
        '<link rel="stylesheet" href="style.css"></head><body>'
        '<a class="skip" href="#main">To the content</a>'
        '<header><nav aria-label="Pages">{}</nav></header>'
        '<main id="main"><h1>{}</h1>{}{}</main>'
        '<footer><p>{}</p></footer></body></html>\n',
        title, site.service, join(menu), title, notice(site), join(parts),
        h('Signed in as {}', site.account['address']) if site.account
        else site.service)
    return Answer(body, status=status, headers=headers, forms=forms)


def notice(site):
    """What the operator has to say to everybody, of a file."""
    try:
        with open(site.file('notice'), encoding='utf-8') as file:
            text = file.read(4096).strip()
    except (OSError, UnicodeDecodeError):
        return ''
    return h('<p class="notice" role="status">{}</p>', text) if text else ''


##############################################################################
# Requests
##############################################################################


def fields_parse(text, most):
    """{name: value} of a query or a form; Problem if it is too much, not
    UTF-8, or has a name twice.
    """
    from urllib.parse import parse_qsl
    if len(text) > most:
        raise bad('This is too long.')
    try:
        pairs = parse_qsl(text, keep_blank_values=True, errors='strict',
                          max_num_fields=MOST['fields'])
    except ValueError:
        raise bad('The fields of this request cannot be read.') from None
    found = dict(pairs)
    if len(found) != len(pairs) or any(
            len(value) > MOST['field'] for value in found.values()):
        raise bad('A field is there twice, or too long.')
    return found


class Request:
    """What was asked, from the environment of CGI and standard input.

    The host that the client named is not looked at, anywhere.
    """

    def __init__(self, environ):
        get = environ.get
        self.method = get('REQUEST_METHOD', '')
        self.script = os.path.basename(get('SCRIPT_NAME', ''))
        self.address = get('REMOTE_ADDR', '')
        self.https = get('HTTPS', '').lower() == 'on'
        self.agent = printable(get('HTTP_USER_AGENT', ''))[:200]
        self.from_site = get('HTTP_SEC_FETCH_SITE', 'none')
        self.environ = environ
        self.query, self.form, self.body, self.cookies = {}, {}, b'', {}

    def read(self, raw):
        """Take body, query and cookies; Problem if these are too large.

        With `raw` the body is whatever it is and stays in `body`.
        """
        get = self.environ.get
        # First of all: a script that ends with a body unread can have its
        # answer cut off by mod_cgid.
        length = get('CONTENT_LENGTH') or '0'
        if get('HTTP_TRANSFER_ENCODING'):
            sys.stdin.buffer.read(MOST['body'])
            raise Problem('411 Length Required', 'That was not understood',
                          'Say how long the request is.')
        if not (length.isascii() and length.isdigit()
                and int(length) <= MOST['body']):
            raise Problem('413 Content Too Large', 'That was too much',
                          'A request has at most 65536 bytes.')
        self.body = sys.stdin.buffer.read(int(length))
        if len(self.body) != int(length):
            raise bad('The request ended early.')
        self.query = fields_parse(get('QUERY_STRING', ''), MOST['query'])
        cookies = get('HTTP_COOKIE', '')
        for part in cookies.split(';') if (
                len(cookies) <= MOST['cookies']) else ():
            name, _, value = part.strip().partition('=')
            self.cookies.setdefault(name, value)
        if self.method != 'POST' or raw:
            return
        if get('CONTENT_TYPE', '').partition(';')[0].strip().lower() != (
                'application/x-www-form-urlencoded'):
            raise Problem('415 Unsupported Media Type',
                          'That was not understood', 'Send a form.')
        try:
            text = self.body.decode('ascii')
        except UnicodeDecodeError:
            raise bad('The fields of this request cannot be read.') from None
        self.form = fields_parse(text, MOST['body'])


##############################################################################
# Site
#
# A Server as far as the accounts go: wishes for anything else are refused.
##############################################################################


class NoBlocks:
    """In place of what this process has no part in: blocks, keys, index.

    `threads` are those of the accounts, as wishes come many at once.
    """

    def __init__(self, threads):
        self.threads = threads

    def __getattr__(self, name):
        raise StoreError(name, 'blocks', 'the account pages have no access')


class History(tarsnapd.View):
    """A view that keeps each machine's days, too, all there ever were.

    `months` has what an account used in each, so that a balance of long ago
    is known without its days; `latest` when a machine last stored something.
    """

    VERSION = 100 + tarsnapd.VIEW_VERSION
    SCHEMA = tarsnapd.VIEW_SCHEMA + ''';
CREATE TABLE days (account TEXT, day INTEGER, machine TEXT, stored INTEGER,
 up INTEGER, down INTEGER, storage INTEGER, upload INTEGER, download INTEGER,
 PRIMARY KEY (account, day, machine)) WITHOUT ROWID;
CREATE TABLE months (account TEXT, month TEXT, used TEXT,
 PRIMARY KEY (account, month)) WITHOUT ROWID;
CREATE TABLE latest (account TEXT, machine TEXT, bytes INTEGER,
 backup INTEGER, PRIMARY KEY (account, machine)) WITHOUT ROWID'''

    @staticmethod
    def from_the_start(run):
        return True

    @staticmethod
    def load(run, day, closed):
        for name in ('days', 'months', 'latest'):
            run('DELETE FROM ' + name)
        tarsnapd.View.load(run, day, closed)

    @staticmethod
    def apply(run, usage, size, charge=True):
        if not tarsnapd.View.apply(run, usage, size, charge):
            return
        month, used = tarsnapd.month_text(usage.day), {}
        for machine, row in usage.rows.items():
            account = row.account
            if account == '-':
                continue
            if row.stored or row.up or row.down:
                run('INSERT INTO days VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)', (
                    account, usage.day, machine, row.stored, row.up,
                    row.down, *usage.prices))
                used[account] = used.get(account, 0) + sum(
                    usage.amounts(machine))
            run('INSERT INTO latest VALUES (?, ?, ?, ?) ON CONFLICT '
                '(account, machine) DO UPDATE SET bytes = excluded.bytes, '
                'backup = coalesce(excluded.backup, backup)', (
                    account, machine, row.bytes,
                    usage.day if row.up else None))
        for account, amount in used.items():
            before = run('SELECT used FROM months WHERE account = ? AND '
                         'month = ?', (account, month)).fetchone() or (0,)
            run('REPLACE INTO months VALUES (?, ?, ?)',
                (account, month, str(int(before[0]) + amount)))

    # What pages wish to know of one account.

    @staticmethod
    def billed(run):
        """The last day that is charged, None if none is."""
        return run('SELECT min(day) FROM shards').fetchone()[0]

    @staticmethod
    def machines(run, account):
        """{machine: (bytes, day of its last backup or None)}."""
        return {machine: (size, day) for machine, size, day in run(
            'SELECT machine, bytes, backup FROM latest WHERE account = ?',
            (account,))}

    @staticmethod
    def days_of(run, account, first, last, machine=None):
        """[(day, machine, (stored, up, down), (their prices))], in order."""
        return [(row[0], row[1], row[2:5], row[5:8]) for row in run(
            'SELECT day, machine, stored, up, down, storage, upload, download'
            ' FROM days WHERE account = ? AND day BETWEEN ? AND ?'
            + (' AND machine = ?' if machine else ''),
            (account, first, last) + ((machine,) if machine else ()))]

    @staticmethod
    def used_before(run, account, month):
        """Attodollars that were used before a month, such as 2026-11."""
        return sum(int(used) for used, in run(
            'SELECT used FROM months WHERE account = ? AND month < ?',
            (account, month)))

    @staticmethod
    def backup_days(run, account, first):
        """{machine: days from `first` on on which it stored something}."""
        found = {}
        for machine, day in run('SELECT machine, day FROM days WHERE '
                                'account = ? AND day >= ? AND up > 0',
                                (account, first)):
            found.setdefault(machine, []).append(day)
        return found

    @staticmethod
    def money(run, account):
        """[(time, key, kind, amount, text)] that came or went, in order."""
        return [(when, key, kind, int(amount), text)
                for when, key, kind, amount, text in run(
                    'SELECT time, key, kind, amount, text FROM entries WHERE '
                    'account = ? ORDER BY time, key', (account,))]


class Site(tarsnapd.Server):
    """The store of accounts, and the request that is being answered.

    account     who is logged in, a dict, or None; found with its version
    session     of the one who is logged in, None if nobody is
    facts       what the server says of itself: tarsnapd.site_get
    """

    def __init__(self, path, request):
        import threading
        self.path = path
        self.conf = tarsnapd.conf_read(path, 'web.conf', 'web', OPTIONS)
        if 'accounts' not in self.conf:
            raise ServerError('%s/web.conf: no accounts in it' % path)
        self.complain = tarsnapd.say
        self.post = True                # mail is queued, not sent
        self.read_only = self.frozen = False
        self.temporary = self.fan = None
        self.lock = threading.Lock()
        self.accounts = tarsnapd.store_open(path, self.conf, name='accounts')
        self.store = self.indexes = self.spools = NoBlocks(
            self.accounts.threads)
        self.view = History(self.file('ledger.db'))
        self.traffic = None
        self.request = request
        self.script = request.script
        self.account = self.found = self.session = None
        self.visit = ''
        self.cookies = []               # to be set
        self.key = self.run(tarsnapd.link_key())
        self.facts = self.run(tarsnapd.site_get())
        self.guesses = tarsnapd.Guesses(self.file('guesses'), self.key)
        self.now = self.perform(('now',))
        self.service = self.facts.get('service', 'tarsnapd')
        prices = self.facts.get('prices')
        # None: nobody pays, as where all are 0.
        self.prices = tarsnapd.Prices(*prices) if any(prices or ()) else None
        self.amnesty = self.facts.get('amnesty', False)

    def file(self, name):
        return os.path.join(self.path, name)

    def can_pay(self):
        """True if one can pay on these pages."""
        return 'pay-keys' in self.conf

    def url(self, name=''):
        """The address of one of our pages, as others may use it.

        From tarsnapd.conf, never from the request.  ServerError if it does
        not stand there.
        """
        url = self.facts.get('url')
        if not url:
            raise ServerError('tarsnapd.conf has no web-url, or the server '
                              'was not started since')
        return url.rpartition('/')[0] + '/' + name

    def mac(self, what, text):
        """A signature that nobody else can make; `what` it is for."""
        import hmac
        return hmac.digest(self.key, b'web-%s\0%s' % (
            what.encode(), text.encode('utf-8', 'replace')), 'sha256').hex()

    def same(self, one, other):
        import hmac
        return hmac.compare_digest(one.encode('utf-8', 'replace'),
                                   other.encode('utf-8', 'replace'))

    def cookie(self, name, value, seconds=None):
        """Have a cookie set; '' takes it away."""
        https = self.request.https
        self.cookies.append(('Set-Cookie', '%s%s=%s; Path=/; HttpOnly; '
                             'SameSite=Lax%s%s' % (
                                 '__Host-' if https else '', name, value,
                                 '; Secure' if https else '',
                                 '' if value else '; Max-Age=0')))

    def cookie_get(self, name):
        return self.request.cookies.get(
            ('__Host-' if self.request.https else '') + name, '')

    def token(self):
        """What proves that a form was made by us, for this browser."""
        if self.session:
            return self.mac('form', self.session)
        if not self.visit:
            self.visit = self.cookie_get('visit')
            if len(self.visit) != 32 or not self.visit.isalnum():
                self.visit = os.urandom(16).hex()
                self.cookie('visit', self.visit)
        return self.mac('form', self.visit)

    def token_check(self):
        """Problem unless the form that was posted is ours."""
        request = self.request
        if request.from_site not in ('same-origin', 'none') or not (
                self.session or self.cookie_get('visit')) or not self.same(
                    request.form.get('token', ''), self.token()):
            raise Problem('403 Forbidden', 'This form is too old',
                          'Nothing was done. Go back, load the page again '
                          'and repeat it.')

    # Sessions: session/ACCOUNT/HASH among the accounts, HASH of the secret
    # part of the cookie, so that who reads the store cannot take one over.

    def session_place(self, ident, secret):
        return 'session/%s/%s' % (ident, tarsnapd.sha256(
            secret.encode()).hex()[:32])

    def session_start(self, account):
        """Log in: the cookie is set with the answer."""
        ident, secret = account['id'], os.urandom(16).hex()
        for place, _ in self.sessions(account)[SESSIONS - 1:]:
            self.perform(('delete', place))
        place = self.session_place(ident, secret)
        self.perform(('put', place, tarsnapd.versioned_encode(place, {
            'time': self.now, 'until': self.now + SESSION_SECONDS,
            'state': tarsnapd.link_state(account),
            'agent': self.request.agent, 'address': self.request.address})))
        said = '%s.%s' % (ident, secret)
        self.cookie('session', '%s.%s' % (said, self.mac('session', said)))

    def sessions(self, account):
        """[(place, session)] that are good, the newest first; others go."""
        good = []
        for place in self.perform(('list', 'session/%s/' % account['id'])):
            session = self.run(tarsnapd.summed_get(place))
            if session and self.session_good(session, account):
                good.append((place, session))
            elif session:
                self.perform(('delete', place))
        return sorted(good, key=lambda one: (-one[1]['time'], one[0]))

    def session_good(self, session, account):
        """True while it lasts, and the password is the one it began with."""
        return (session['time'] <= self.now + 300
                and self.now < session['until']
                and session['state'] == tarsnapd.link_state(account))

    def session_find(self):
        """Know who is logged in, by the cookie."""
        parts = self.cookie_get('session').split('.')
        if len(parts) != 3 or not self.same(parts[2], self.mac(
                'session', '%s.%s' % tuple(parts[:2]))):
            return
        place = self.session_place(parts[0], parts[1])
        session = self.run(tarsnapd.summed_get(place))
        found = session and self.run(tarsnapd.account_load(parts[0]))
        if found and not found[1].get('closed') and (
                self.session_good(session, found[1])):
            self.found, self.account, self.session = found, found[1], place

    def login(self, address, password):
        """(account or None, True if there is such a user).

        The work is the same whether there is one or not.  Problem if too
        many wrong passwords were tried.
        """
        request, now = self.request, self.now
        seconds = self.guesses.charge(request.address, address, now)
        if seconds:
            raise Problem('429 Too Many Requests', 'Too many attempts',
                          'Too many wrong passwords were tried. Try again '
                          'in %d seconds.' % seconds)
        known, account = self.run(tarsnapd.account_login(address, self.key))
        right = tarsnapd.account_right(account, password.encode('utf-8'))
        if not (known and right):
            return None, known
        seconds = self.guesses.forgive(request.address, address, now)
        if seconds:
            raise Problem('429 Too Many Requests', 'Too many attempts',
                          'Try again in %d seconds.' % seconds)
        return account, True

    def confirm(self):
        """Problem unless the form has the password of who is logged in.

        An open session alone changes nothing that matters.
        """
        account, _ = self.login(self.account['address'],
                                self.request.form.get('password', ''))
        if not account or account['id'] != self.account['id']:
            raise Problem('403 Forbidden', 'That is not the password',
                          'Nothing was changed. Go back and try again.')

    def password(self):
        """The new password of a form, as bytes; Problem if it is none."""
        form = self.request.form
        password, again = (form.get(name, '') for name in ('new', 'again'))
        if password != again:
            raise bad('The two passwords differ. Go back and try again.')
        data = password.encode('utf-8')
        if len(password) < PASSWORD[0] or len(data) > PASSWORD[1]:
            raise bad('A password has at least %d characters. Go back and '
                      'try again.' % PASSWORD[0])
        return data

    def ask(self, kind, address):
        """Have a mail sent with a link; Problem if that is too much.

        What is done here is the same for any address.
        """
        if not self.facts.get('url'):
            raise Problem('503 Service Unavailable', 'No mail is sent here',
                          'Ask whoever runs this service instead.')
        if not tarsnapd.mail_address(address):
            raise bad('That is not a mail address. Go back and try again.')
        seconds = self.guesses.ask(self.request.address, self.now, 'mails')
        if seconds:
            raise Problem('429 Too Many Requests', 'Too many mails',
                          'Too many mails were asked for from your address. '
                          'Try again in %d minutes.' % (seconds // 60 + 1))
        self.run(tarsnapd.ask_put(kind, address,
                                  self.account['id'] if self.account else ''))

    def balance(self, account):
        """The Balance of an account, after its ledger was caught up with."""
        self.run(tarsnapd.ledger_catch_up(account['id']))
        return self.perform(('view', 'balance', account['id']))


##############################################################################
# Serving
##############################################################################


class Nobody:
    """In place of a Site where there is none: enough for a page."""

    def __init__(self, request):
        self.service, self.account = 'tarsnapd', None
        self.script = request.script

    def file(self, name):
        return os.devnull


def serve(get=None, post=None, login=True, token=True, raw=False):
    """Answer the request that this process was started for.

    `get` and `post` are called with the Site and return an Answer.  With
    `login` whoever is not logged in is sent to log in first.  `token` is
    False where a POST is not from a form of ours, and says itself who sends
    it; `raw` where its body is no form.
    """
    request = Request(os.environ)
    site = Nobody(request)
    try:
        request.read(raw)
        if not request.https and request.address not in ('127.0.0.1', '::1'):
            raise Problem('403 Forbidden', 'Not without TLS', 'Passwords '
                          'are not taken over a connection that others can '
                          'read: use https.')
        act = {'GET': get, 'HEAD': get, 'POST': post}.get(request.method)
        if act is None:
            raise Problem('405 Method Not Allowed', 'That is not done here',
                          'This page does not do that.')
        site = Site(os.environ.get('TARSNAP_WEB', '/etc/tarsnap-web'),
                    request)
        site.session_find()
        if login and not site.account:
            answer = redirect('account.html')
        else:
            if request.method == 'POST' and token:
                site.token_check()
            answer = act(site)
    except Problem as e:
        answer = page(site, e.title, h('<p>{}</p>', e), status=e.status)
    except Exception as e:
        answer = failure(site, e)
    answer.headers += getattr(site, 'cookies', ())
    answer.send(request.https, request.method == 'HEAD')


def failure(site, error):
    """The Answer where something is wrong here; why is for the log only."""
    if isinstance(error, (ServerError, StoreError, OSError)):
        tarsnapd.say('web: %s: %s' % (site.script, error))
    else:
        import traceback
        tarsnapd.say('web: %s: %s' % (site.script, ' | '.join(
            traceback.format_exc().split('\n'))))
    return page(site, 'Something is wrong here', h(
        '<p>This page cannot be shown now. Your backups are not touched by '
        'that. Try again in a while.</p>'),
        status='503 Service Unavailable')


##############################################################################
# Words
##############################################################################


def size_text(size):
    """Bytes as a person reads them."""
    for unit in ('bytes', 'kB', 'MB', 'GB', 'TB'):
        if size < 1000 or unit == 'TB':
            break
        size /= 1000
    return '%d bytes' % size if unit == 'bytes' else '%.3g %s' % (size, unit)


def date(day):
    """A day, by its number since 1970."""
    return h('<time>{}</time>', tarsnapd.day_text(day))
