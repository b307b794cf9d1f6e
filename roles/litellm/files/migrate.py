"""Brings the database that DATABASE_URL names to what this version of LiteLLM needs.

Run by the environment that is to serve.
"""

import sys

from litellm_proxy_extras import utils

# Where the URL names a socket, its own checks would look for the database on localhost.
utils.LIBPQ_URL_PARAMS |= {"host"}
try:
    sys.exit(not utils.ProxyExtrasDBManager.run_migration_job(use_migrate=True, use_v2_resolver=True))
except RuntimeError as error:
    sys.exit(str(error))
