from datasets import load_dataset
from peft import LoraConfig
from rewards_of_mine import right, short
from trl import GRPOConfig, GRPOTrainer

MODEL = "./model"
BATCH = 4 * 4
rewards = [right, short]
train = load_dataset("json", data_files="plain.jsonl")["train"]
config = GRPOConfig(
    "out",
    BATCH,
    num_generations=4,
    learning_rate=2 * 1e-5,
    temperature=0.9,
    top_k=5,
    reward_weights=[1.0, 0.5],
    max_completion_length=16,
)
lora = LoraConfig(r=16, target_modules=["q_proj", "o_proj"])
trainer = GRPOTrainer(MODEL, rewards, config, train, peft_config=lora)

if __name__ == "__main__":
    trainer.train()
