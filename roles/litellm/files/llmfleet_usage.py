"""Has LiteLLM charge a stream that its client cuts by what vLLM has counted, and write nothing of what is refused.

LiteLLM 1.106.2 would count the text of a chat with the tokenizer of another model, and charge nothing for a text
completion. Of a request that is refused it would write a row, as it does from 1.105 on: free, and without end.
"""

from litellm.integrations.custom_logger import CustomLogger
from litellm.llms.openai.completion import handler
from litellm.proxy import common_request_processing
from litellm.proxy.hooks.proxy_track_cost_callback import _ProxyDBLogger

charge_cut_stream = common_request_processing._bill_partial_streamed_spend_on_disconnect
write_failed = getattr(_ProxyDBLogger, "_write_failure_spend_rows", None)


class ContinuousUsage(CustomLogger):
    """vLLM says with each piece of a stream how many tokens there were so far."""

    async def async_pre_call_deployment_hook(self, kwargs, call_type):
        options = kwargs.get("stream_options") or {}
        if not kwargs.get("stream") or not isinstance(options, dict):
            return None
        return {**kwargs, "stream_options": {**options, "include_usage": True, "continuous_usage_stats": True}}


class TextStream(handler.CustomStreamWrapper):
    """A text completion's, which LiteLLM hides from what charges a stream that was cut."""

    def __init__(self, *arguments, logging_obj, **others):
        super().__init__(*arguments, logging_obj=logging_obj, **others)
        logging_obj.llmfleet_text_stream = self


async def charge_cut_stream_of_any_kind(request_data, response):
    stream = getattr(request_data.get("litellm_logging_obj"), "llmfleet_text_stream", response)
    return await charge_cut_stream(request_data, stream)


async def write_failed_that_cost(self, *, spend_rows, **others):
    await write_failed(self, spend_rows=[(cost, row) for cost, row in spend_rows if cost > 0], **others)


continuous_usage = ContinuousUsage()
if write_failed:
    _ProxyDBLogger._write_failure_spend_rows = write_failed_that_cost
handler.CustomStreamWrapper = TextStream
common_request_processing._bill_partial_streamed_spend_on_disconnect = charge_cut_stream_of_any_kind
