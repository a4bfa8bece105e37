#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A new password for whoever reads the mail of an account."""

import web
from web import para

def get(site):
    return web.page(
        site, 'A new password',
        para('We send you a mail with a link; there you choose a new '
             'password. Until then the old one stays.'),
        web.form(site, 'forgot.cgi', web.field(
            'Mail address', 'address', 'email', complete='username'),
            button='Send me the link'))


def post(site):
    address = site.request.form.get('address', '')
    site.ask('reset', address)
    return web.page(
        site, 'Read your mail',
        para('If there is an account <strong>{}</strong>, a mail is on its '
             'way to it. Follow the link in it within two hours.', address),
        para('The password of an account has nothing to do with your keys: '
             'without the key file of a machine nobody can read what it '
             'stored, and nobody can send you another one.'))


web.serve(get, post, login=False)
