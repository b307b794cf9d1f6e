// Copyright: llmfleet developers
// GNU General Public License v3.0+ (see LICENSE)
//
// What the database's URL says to Prisma's engines, whose TLS options are neither libpq's nor pg's.
'use strict';
const fs = require('fs');

const UNUSED = ['pool_timeout', 'pgbouncer', 'connect_timeout', 'socket_timeout', 'statement_cache_size', 'max_idle_connection_lifetime'];

function target(given) {
  const url = new URL(given);
  const take = (name) => {
    const value = url.searchParams.get(name);
    url.searchParams.delete(name);
    return value;
  };
  const [schema, max, mode, accept, authority] = ['schema', 'connection_limit', 'sslmode', 'sslaccept', 'sslcert'].map(take);
  UNUSED.forEach(take);
  const checked = { rejectUnauthorized: accept === 'strict', ...(authority && { ca: fs.readFileSync(authority) }) };
  return {
    schema: schema || 'public',
    max: Number(max || 10),
    connection: { connectionString: url.toString(), ...(mode === 'require' && { ssl: checked }) },
    name: url.pathname.slice(1),
    place: url.searchParams.get('host') || url.host,
  };
}

module.exports = { target };
