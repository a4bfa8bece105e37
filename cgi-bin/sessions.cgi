#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Ends all sessions, also this one."""

import web


def post(site):
    for place, _ in site.sessions(site.account):
        site.perform(('delete', place))
    site.cookie('session', '')
    return web.redirect('account.html')


def get(site):
    return web.redirect('settings.cgi')


web.serve(get, post)
