"""Video-LLaVA on a tenth of its video tokens: python examples/transformers/video_llava.py VIDEO [MODEL]"""

import sys

from transformers import AutoModelForImageTextToText, AutoProcessor

from cacovid_kernels.compressors import divprune
from cacovid_kernels.integrations.transformers import compress

video, name = (*sys.argv[1:], "LanguageBind/Video-LLaVA-7B-hf")[:2]
processor = AutoProcessor.from_pretrained(name)
model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")
prompt = "USER: <video>\nWhat happens in this video? ASSISTANT:"
inputs = processor(text=prompt, videos=[video], num_frames=8, return_tensors="pt").to(model.device, model.dtype)
with compress(model, divprune, keep_ratio=0.1):
    ids = model.generate(**inputs, max_new_tokens=64)
print(processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
