#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Mails a link to another address; it counts once that is followed."""

import web


def post(site):
    address = site.request.form.get('address', '')
    site.confirm()
    site.ask('move', address)
    return web.page(site, 'Read your mail', web.para(
        'A mail is on its way to <strong>{}</strong>. Your account has that '
        'address as soon as you follow the link in it, within a day.',
        address))


def get(site):
    return web.redirect('settings.cgi')


web.serve(get, post)
