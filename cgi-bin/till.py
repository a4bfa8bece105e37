# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""till: paying on the web, and what providers say of it.

Nothing is entered because of what a browser or a webhook says: each makes us
look at the provider's API, by the steps of tarsnapd.py, "Payments".
"""

import web
from web import ServerError, StoreError, h, para, tarsnapd

from tarsnapd import (                      # web knows where it is
    PROVIDER_NAMES, Forged, Outcome, ProviderError)

WAYS = {'stripe': 'Card, by Stripe', 'paypal': 'PayPal'}


def shop(site):
    """What can be paid, a Shop; Problem if nothing can."""
    if 'pay-keys' not in site.conf:
        raise web.Problem('404 Not Found', 'Nothing can be paid here',
                          'Ask whoever runs this service how to pay.')
    return site.shop()


def choose(site):
    """The form: how much, and how."""
    till = shop(site)
    least = site.run(tarsnapd.checkout_least(till, site.account['id']))
    ways = web.join(h(
        '<label class="choice"><input type="radio" name="provider" '
        'value="{}" required{}> {}</label>', name, web.Html(
            '' if i else ' checked'), WAYS[name])
        for i, name in enumerate(till.offered()))
    return web.page(
        site, 'Add money',
        web.form(
            site, 'pay.cgi',
            web.field('Dollars', 'dollars', 'number', note='$%d to $%d, in '
                      'whole dollars.' % (least, till.most), more=h(
                          'min="{}" max="{}" step="1" value="{}"', least,
                          till.most, max(least, min(20, till.most)))),
            h('<fieldset><legend>Through</legend>{}</fieldset>', ways),
            button='Go and pay'),
        para('You pay on a page of the one you choose; we never see the '
             'number of your card. The money is on your account at once, '
             'and a receipt comes by mail.'),
        para('This is a trial: no money is taken.') if till.trials else '',
        forms=[till.pages(name) for name in till.offered()])


def begin(site):
    """Send the browser to where one pays."""
    till, form = shop(site), site.request.form
    dollars, provider = form.get('dollars', ''), form.get('provider', '')
    if not (dollars.isascii() and dollars.isdigit() and len(dollars) < 7):
        raise web.bad('Give an amount in whole dollars.')
    try:
        _, url = site.run(tarsnapd.checkout_begin(
            till, provider, site.account['id'], int(dollars)))
    except ServerError as e:
        raise web.Problem('400 Bad Request', 'Nothing was paid',
                          'Nothing was charged: %s.' % e) from None
    except ProviderError as e:
        tarsnapd.say('web: pay.cgi: %s' % e)
        raise web.Problem(
            '503 Service Unavailable', 'Nothing was paid',
            'Nothing was charged: %s cannot be reached now. Try again in a '
            'while.' % PROVIDER_NAMES[provider]) from None
    return web.Answer('', status='303 See Other', headers=[('Location', url)])


# What a payer is told who comes back, by the state of his checkout.
STATES = {
    'open': ('Not paid', 'Nothing was charged. If you have just paid, load '
             'this page again in a minute; else you can try again.'),
    'waiting': ('On its way', 'Your bank has not sent the money yet. When '
                'it comes, which may take some days, it is added by itself, '
                'and a receipt comes by mail.'),
    'unsure': ('A moment, please', 'We cannot see now whether this payment '
               'was made. If it was, it is added by itself, and a receipt '
               'comes by mail.'),
    'ended': ('Not paid', 'This payment was not made, and nothing was '
              'charged.'),
    'differs': ('We have to look at it', 'Something about this payment is '
                'not as it should be. It was noted, and a person will look '
                'at it.')}


def back(site):
    """Where a payer comes back to, paid or not."""
    name, out = site.request.query.get('checkout', ''), Outcome()
    till = shop(site)
    if name.startswith(site.account['id'] + '-'):
        try:
            site.run(tarsnapd.checkout_settle(till, out, name))
        except ProviderError as e:
            tarsnapd.say('web: paid.cgi: %s' % e)
            out.state = 'unsure'
    say_all(out)
    if out.state == 'unknown':
        raise web.Problem('404 Not Found', 'No such payment',
                          'This account has begun no such payment.')
    more = h('<p class="links"><a href="payments.cgi">Your payments</a>'
             '<a href="pay.cgi">Add money</a></p>')
    if out.state == 'paid':
        money = site.balance(site.account).money
        return web.page(site, 'Thank you', para(
            'Your payment has arrived. Your balance is {}.',
            tarsnapd.money_short(money)), more)
    title, text = STATES[out.state]
    return web.page(site, title, para('{}', text), more)


def say_all(out):
    """What was entered, and what differs, for the log."""
    for line in out.did + out.differs:
        tarsnapd.say('web: ' + tarsnapd.printable(line))


def hook(site, provider):
    """Take a webhook: 200 if all is done that is to be done, 400 if it is
    forged; else 503, and the provider sends it again.
    """
    headers = {name[5:].replace('_', '-'): value for name, value
               in site.request.environ.items() if name.startswith('HTTP_')}
    out, status = Outcome(), '200 OK'
    try:
        till = shop(site)
        if provider not in till.providers:
            raise Forged('a webhook of %s, which is not configured'
                         % provider)
        site.run(tarsnapd.pay_webhook(till, out, provider, headers,
                                      site.request.body))
    except (Forged, ProviderError, ServerError, StoreError) as e:
        tarsnapd.say('web: %s: %s' % (site.script, tarsnapd.printable(
            str(e))))
        status = ('400 Bad Request' if isinstance(e, Forged)
                  else '503 Service Unavailable')
    say_all(out)
    return web.Answer(status + '\n', 'text/plain', status)
