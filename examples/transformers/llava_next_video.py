"""LLaVA-NeXT-Video on a tenth of its video tokens: python examples/transformers/llava_next_video.py VIDEO [MODEL]"""

import sys

from transformers import AutoModelForImageTextToText, AutoProcessor

from cacovid_kernels.compressors import divprune
from cacovid_kernels.integrations.transformers import compress

video, name = (*sys.argv[1:], "llava-hf/LLaVA-NeXT-Video-7B-hf")[:2]
processor = AutoProcessor.from_pretrained(name)
model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")
content = [{"type": "video", "path": video}, {"type": "text", "text": "What happens in this video?"}]
options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
inputs = processor.apply_chat_template([{"role": "user", "content": content}], num_frames=16, **options)
inputs = inputs.to(model.device, model.dtype)
with compress(model, divprune, keep_ratio=0.1):
    ids = model.generate(**inputs, max_new_tokens=64)
print(processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
