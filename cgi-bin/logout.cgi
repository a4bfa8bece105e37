#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Ends the session; of whoever is not logged in there is none."""

import web


def post(site):
    site.perform(('delete', site.session))
    site.cookie('session', '')
    return web.redirect('account.html')


web.serve(post=post)
