#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""An account for whoever reads mail to an address."""

import web
from web import para

def get(site):
    return web.page(
        site, 'Register',
        para('We send you a mail with a link; there you choose a password.'),
        web.form(site, 'register.cgi', web.field(
            'Mail address', 'address', 'email', complete='email'),
            button='Send me the link'))


def post(site):
    address = site.request.form.get('address', '')
    site.ask('join', address)
    return web.page(
        site, 'Read your mail',
        para('A mail is on its way to <strong>{}</strong>. Follow the link in '
             'it within three days.', address),
        para('Nothing came after a few minutes? Look among what your mail '
             'program takes for spam, and see that the address is right.'))


web.serve(get, post, login=False)
