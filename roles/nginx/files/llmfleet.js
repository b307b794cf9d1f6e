// Ansible managed
// Whose key a request has, and which model it is for.
import crypto from 'crypto';

const MOST_BRACKETS = 100000;
// Before LiteLLM, which would obey them, though no SDK sends them: they lead elsewhere, or let an answer go uncounted.
const NOT_SENT = ['additional_drop_params', 'allowed_openai_params', 'api_base', 'api_key', 'base_url', 'custom_llm_provider',
    'drop_params', 'extra_body', 'extra_headers', 'headers', 'litellm_call_id', 'litellm_metadata', 'litellm_params', 'litellm_session_id',
    'litellm_trace_id', 'max_retries', 'no-log', 'num_retries', 'specific_deployment', 'stream_timeout', 'tags', 'timeout'];
const TEXTS = ['input', 'instructions', 'prompt', 'stop', 'suffix'];
const LISTED = ['cache-control', 'content-encoding', 'content-length', 'content-type', 'retry-after'];

// The name of the key's owner, empty without a right key. llmfleet_keys is {SHA-256 of a key: name}, read from keys.json.
function client(r) {
    const given = /^bearer +([\w.~+/=-]+)$/i.exec(r.variables.http_authorization || '');
    return given ? llmfleet_keys[crypto.createHash('sha256').update(given[1]).digest('hex')] || '' : '';
}

function refuse(r, status, message, param, code) {
    r.headersOut['Content-Type'] = 'application/json';
    r.return(status, JSON.stringify({error: {message: message, type: 'invalid_request_error', param: param, code: code}}));
}

// {model: number of its upstream, or 0 where all its servers are drained}
function routes(r) {
    return JSON.parse(r.variables.llmfleet_routes);
}

// njs keeps 240 bytes for each array or object until the request's end. Those in strings count as well: nobody has parsed it yet.
function hasTooManyBrackets(text) {
    let left = MOST_BRACKETS;
    return ['[', '{'].some((bracket) => {
        let at = text.indexOf(bracket);
        while (at >= 0 && left >= 0) {
            left--;
            at = text.indexOf(bracket, at + 1);
        }
        return left < 0;
    });
}

function isChoices(value, most) {
    return value === undefined || value === null || Number.isInteger(value) && value >= 1 && value <= most;
}

function route(r) {
    if (r.method !== 'POST') {
        r.headersOut['Allow'] = 'POST';
        refuse(r, 405, 'Use POST here.', null, 'method_not_allowed');
        return;
    }
    let text;
    try {
        text = r.requestText;
    } catch (error) { // it is in a file, because it did not fit into the buffer
        refuse(r, 413, 'The request body is too large to be sent in such small chunks.', null, 'request_too_large');
        return;
    }
    if (hasTooManyBrackets(text)) {
        refuse(r, 400, `The request body has more than ${MOST_BRACKETS} opening brackets.`, null, 'invalid_json');
        return;
    }
    let body;
    try {
        body = JSON.parse(text);
    } catch (error) { // not with the parser's message, which quotes the prompt
        const deep = error.message.startsWith('Nested too deep');
        refuse(r, 400, deep ? 'The request body is nested too deep.' : 'The request body is not valid JSON.', null, 'invalid_json');
        return;
    }
    const model = body === null ? undefined : body.model;
    if (typeof model !== 'string' || model === '') {
        refuse(r, 400, 'You must provide a model parameter.', 'model', 'missing_model');
        return;
    }
    const obeyed = r.variables.llmfleet_obeying && NOT_SENT.find((name) => body[name] !== undefined);
    if (obeyed) {
        refuse(r, 400, `${obeyed} is not a parameter of this API.`, obeyed, 'unknown_parameter');
        return;
    }
    // PostgreSQL, which LiteLLM writes all but the texts to, knows no NUL.
    const unwritable = r.variables.llmfleet_obeying && Object.keys(body).find((name) =>
        typeof body[name] === 'string' && body[name].includes('\0') && !TEXTS.includes(name));
    if (unwritable) {
        refuse(r, 400, `${unwritable} must not contain NUL.`, unwritable, 'invalid_value');
        return;
    }
    // LiteLLM would read a text as JSON, and not see the tags in it that it refuses.
    if (r.variables.llmfleet_obeying && typeof body.metadata === 'string') {
        refuse(r, 400, 'metadata must be an object.', 'metadata', 'invalid_value');
        return;
    }
    // vLLM takes 1 and "yes" as true. LiteLLM does not, and would count no tokens.
    if (![undefined, null, true, false].includes(body.stream)) {
        refuse(r, 400, 'stream must be true or false.', 'stream', 'invalid_value');
        return;
    }
    const most = Number(r.variables.llmfleet_max_choices);
    const wrong = ['n', 'best_of'].find((name) => !isChoices(body[name], most));
    if (wrong) {
        refuse(r, 400, `${wrong} must be a whole number from 1 to ${most}.`, wrong, 'invalid_value');
        return;
    }
    // A list of prompts has answers for each of them; a list of numbers is one prompt, as its tokens.
    const prompts = Array.isArray(body.prompt) && typeof body.prompt[0] !== 'number' ? body.prompt.length : 1;
    if (prompts * Math.max(body.n || 1, body.best_of || 1) > most) {
        refuse(r, 400, `prompt, n and best_of ask for more than ${most} answers.`, 'prompt', 'invalid_value');
        return;
    }
    const known = routes(r);
    const names = Object.keys(known);
    // The only model may have LoRA adapters with names of their own, which vLLM knows.
    const name = names.length === 1 ? names[0] : model;
    if (!names.includes(name)) {
        refuse(r, 404, `The model '${model.slice(0, 128)}' does not exist.`, 'model', 'model_not_found');
        return;
    }
    if (!known[name]) {
        r.return(503);
        return;
    }
    const query = r.variables.args ? `?${r.variables.args}` : '';
    r.internalRedirect(`/.llmfleet/${known[name]}${r.uri}${query}`);
}

// The lists of all models' servers in one; those that do not answer are left out.
async function models(r) {
    if (r.method !== 'GET' && r.method !== 'HEAD') {
        r.headersOut['Allow'] = 'GET, HEAD';
        refuse(r, 405, 'Use GET here.', null, 'method_not_allowed');
        return;
    }
    const known = routes(r);
    const upstreams = Object.keys(known).map((model) => known[model]);
    const asked = upstreams.filter((number, at) => number && upstreams.indexOf(number) === at);
    const replies = await Promise.all(asked.map(
        (number) => r.subrequest(`/.llmfleet/${number}/v1/models`, {method: 'GET'})));
    let data = [];
    let answered = false;
    replies.forEach((reply) => {
        if (reply.status !== 200) {
            return;
        }
        try {
            data = data.concat(JSON.parse(reply.responseText).data);
            answered = true;
        } catch (error) {
            r.error('a backend\'s list of models is not JSON');
        }
    });
    if (!answered) {
        const refusal = replies.find((reply) => reply.status >= 400 && reply.status < 500);
        r.return(refusal ? refusal.status : asked.length ? 502 : 503);
        return;
    }
    r.headersOut['Content-Type'] = 'application/json';
    r.return(200, JSON.stringify({object: 'list', data: data}));
}

// Clients learn nothing of what stands behind: neither its version nor its addresses.
function hide(r) {
    Object.keys(r.headersOut).forEach((name) => {
        const lower = name.toLowerCase();
        if (!LISTED.includes(lower) && !lower.startsWith('x-ratelimit-')) {
            delete r.headersOut[name];
        }
    });
}

export default {client, hide, models, route};
