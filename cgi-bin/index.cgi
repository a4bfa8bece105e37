#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The first page: what this is and what it costs.

Links in mails may lead here, too.
"""

import figures
import web


def get(site):
    link = site.request.query.get('link')
    if link:
        from urllib.parse import quote
        return web.redirect('confirm.cgi?link=' + quote(link))
    return figures.home(site)


web.serve(get, login=False)
