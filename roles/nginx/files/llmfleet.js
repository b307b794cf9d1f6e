// Ansible managed
// Sends each request to the model that its JSON body names. Used only where several models are served.

function refuse(r, status, message, param, code) {
    r.headersOut['Content-Type'] = 'application/json';
    r.return(status, JSON.stringify({error: {message: message, type: 'invalid_request_error', param: param, code: code}}));
}

// {model: number of its upstream}
function routes(r) {
    return JSON.parse(r.variables.llmfleet_routes);
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
    let body;
    try {
        body = JSON.parse(text);
    } catch (error) {
        refuse(r, 400, 'The request body is not valid JSON.', null, 'invalid_json');
        return;
    }
    const model = body === null ? undefined : body.model;
    if (typeof model !== 'string' || model === '') {
        refuse(r, 400, 'You must provide a model parameter.', 'model', 'missing_model');
        return;
    }
    const known = routes(r);
    if (!Object.keys(known).includes(model)) {
        refuse(r, 404, `The model '${model.slice(0, 128)}' does not exist.`, 'model', 'model_not_found');
        return;
    }
    const query = r.variables.args ? `?${r.variables.args}` : '';
    r.internalRedirect(`/.llmfleet/${known[model]}${r.uri}${query}`);
}

// The lists of all models' servers in one; those that do not answer are left out.
async function models(r) {
    const known = routes(r);
    const replies = await Promise.all(Object.keys(known).map(
        (model) => r.subrequest(`/.llmfleet/${known[model]}/v1/models`, {method: 'GET'})));
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
            r.error(`a backend's list of models is not JSON: ${error.message}`);
        }
    });
    if (!answered) {
        r.return(502);
        return;
    }
    r.headersOut['Content-Type'] = 'application/json';
    r.return(200, JSON.stringify({object: 'list', data: data}));
}

export default {route, models};
